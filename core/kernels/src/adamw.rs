//! The arithmetic of AdamW over one parameter.

use crate::parallel::{rows, rows2};

/// The numbers of one update, bias corrections included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// `1 − lr λ`.
    pub decay: f32,
    /// `lr / (1 − β₁ᵗ)`.
    pub rate: f32,
    /// `√(1 − β₂ᵗ)`.
    pub root: f32,
    /// `β₂`.
    pub beta2: f32,
    /// A gradient's share of each moment: `1 − β₁` and `1 − β₂`, rounded once. In f32 alone, `1 − 0.999` is off by 1.3e-5.
    pub shares: [f32; 2],
    /// `ε`.
    pub eps: f32,
}

impl AdamWStep {
    /// Updates the `moments`, first and second behind each other, from `gradient` times `factor`.
    pub fn update_moments(&self, moments: &mut [f32], gradient: &[f32], factor: f32) {
        let Self { beta2, shares: [share1, share2], .. } = *self;
        let (first, second) = moments.split_at_mut(gradient.len());
        rows2(
            first,
            second,
            1,
            #[inline(always)]
            |at, first, second| {
                for ((m, v), &g) in first.iter_mut().zip(second).zip(&gradient[at..]) {
                    let g = g * factor;
                    *m += (g - *m) * share1;
                    *v = *v * beta2 + g * g * share2;
                }
            },
        );
    }

    /// Moves `parameter` by its `moments`.
    pub fn apply(&self, parameter: &mut [f32], moments: &[f32]) {
        let Self { decay, rate, root, eps, .. } = *self;
        let (first, second) = moments.split_at(moments.len() / 2);
        rows(
            parameter,
            1,
            #[inline(always)]
            |at, parameter| {
                for ((w, &m), &v) in parameter.iter_mut().zip(&first[at..]).zip(&second[at..]) {
                    *w = *w * decay - rate * (m / (v.sqrt() / root + eps));
                }
            },
        );
    }
}
