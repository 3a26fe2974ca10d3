//! Launches of the attention kernels. They keep no matrix of scores; `attention.cu` says how they divide the work.

use candle_core::DType::{self, F32, U32};
use candle_core::Tensor;
use titer_kernels::attention::{Attention, Sequence};

use super::launch::{Arg, Grid, Kernels, at, blocks, fresh, launch_from, per_type};
use crate::error::{Error, Result};
use crate::tensor::mask::AttentionMask;

/// The kernels by the width that their tiles have.
macro_rules! kernels {
    ($($width:literal),*) => {
        [$((
            $width,
            Kernels {
                module: concat!("attention_", $width),
                ptx: include_str!(concat!(env!("OUT_DIR"), "/attention_", $width, ".ptx")),
            },
        )),*]
    };
}

const KERNELS: [(usize, Kernels); 6] = kernels![32, 64, 80, 96, 128, 256];

/// Rows of a tile that a warp owns.
const STRIP: usize = 16;

/// Slots of a long cache that a block looks at.
const CHUNK: usize = 256;

/// `Sizes` of `attention.cu`.
#[derive(Clone, Copy)]
struct Sizes {
    warps: usize,
    /// What streams by at a time.
    forward: usize,
    backward: usize,
}

struct Heads<'a> {
    mask: &'a AttentionMask,
    /// The kernels, and the width of their tiles.
    kernels: &'static Kernels,
    tile: usize,
    sizes: Sizes,
    shape: Attention,
    /// The most queries and the most real tokens that a sequence has.
    longest: [usize; 2],
    dtype: DType,
}

impl<'a> Heads<'a> {
    fn new(shape: Attention, dtype: DType, mask: &'a AttentionMask) -> Result<Self> {
        let Some((tile, kernels)) = KERNELS.iter().find(|(tile, _)| shape.width <= *tile) else {
            let widest = KERNELS.map(|(tile, _)| tile)[KERNELS.len() - 1];
            let what = format!("attention with heads of {} elements, and a device takes {widest} at most", shape.width);
            return Err(Error::device(what).help("use --device cpu"));
        };
        let sizes = match (dtype, tile) {
            (F32, 256) => Sizes { warps: 2, forward: 16, backward: 8 },
            (F32, _) => Sizes { warps: 2, forward: 16, backward: 16 },
            (_, 256) => Sizes { warps: 4, forward: 32, backward: 16 },
            _ => Sizes { warps: 4, forward: 64, backward: 32 },
        };
        let most = |of: fn(&Sequence) -> usize| mask.sequences.iter().map(of).max().unwrap_or(0);
        let longest = [most(|sequence| sequence.queries), most(|sequence| sequence.end)];
        Ok(Self { mask, kernels, tile: *tile, sizes, shape, longest, dtype })
    }

    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.shape.query / self.shape.key_value
    }

    /// Rows of a pair of the longest sequence and a key/value head.
    fn rows(&self) -> usize {
        self.longest[0] * self.group()
    }

    fn sequences(&self) -> usize {
        self.mask.sequences.len()
    }

    fn tokens(&self) -> usize {
        self.mask.positions.len()
    }

    /// Queues a kernel with what all of them need to know before its own arguments.
    fn launch(&self, on: &Tensor, name: &str, grid: Grid, arguments: impl IntoIterator<Item = Arg>) -> Result<()> {
        let Attention { key_value, width, window, scale, cap, .. } = self.shape;
        let counts = [self.sequences(), self.tokens(), self.longest[0]];
        let sizes = [key_value, self.group(), width, window.unwrap_or(0)];
        let ([sequences, tokens, longest], [key_value, group, width, window]) =
            (counts.map(|count| count as u32), sizes.map(|size| size as u32));
        let [scale, cap] = [scale, cap.map_or(0., |cap| cap / scale)].map(|number| (number as f32).to_bits());
        let problem = [sequences, tokens, longest, key_value, group, width, window, scale, cap];
        let arguments: Vec<Arg> = std::iter::once(Arg::Problem(problem)).chain(arguments).collect();
        launch_from(self.kernels, on, &per_type(&format!("attention_{name}"), self.dtype)?, grid, &arguments)
    }

    /// Blocks for each pair, whose tiles hold so many vectors together.
    fn grid(&self, blocks: usize, warps: usize, vectors: usize) -> Grid {
        // A vector is followed by 16 bytes that nobody uses.
        let shared = vectors * (self.tile * self.dtype.size_in_bytes() + 16);
        Grid {
            blocks: [(self.sequences() * self.shape.key_value * blocks) as u32, 1],
            threads: 32 * warps as u32,
            shared,
        }
    }
}

/// The result, and `max + ln Σ exp` of each row of scores: `[chunks, heads, tokens]`, f32. Only a long cache,
/// which has no gradient, is divided into chunks of slots.
///
/// # Errors
/// Heads of more than 256 elements, or a tensor operation failed.
pub(in crate::tensor) fn attention(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    mask: &AttentionMask,
) -> Result<(Tensor, Tensor)> {
    let heads = Heads::new(shape, q.dtype(), mask)?;
    let t = heads.dtype;
    let warps = heads.rows().div_ceil(STRIP).min(heads.sizes.warps);
    let tiles = heads.rows().div_ceil(warps * STRIP);
    // A few queries over many slots would leave most of the device idle.
    let chunks = if tiles == 1 { heads.longest[1].div_ceil(CHUNK).max(1) } else { 1 };
    let grid = heads.grid(tiles * chunks, warps, warps * STRIP + 2 * heads.sizes.forward);
    let y = fresh(q, q.shape(), t)?;
    let sums = fresh(q, (chunks, shape.query, heads.tokens()), F32)?;
    let inputs = [at(&mask.table, U32)?, at(q, t)?, at(k, t)?, at(v, t)?];
    if chunks == 1 {
        let outputs = [at(&sums, F32)?, at(&y, t)?, Arg::U64(0), Arg::U32(u32::MAX)];
        heads.launch(q, "fwd", grid, inputs.into_iter().chain(outputs))?;
    } else {
        let parts = fresh(q, (chunks, q.elem_count()), F32)?;
        let outputs = [at(&sums, F32)?, Arg::U64(0), at(&parts, F32)?, Arg::U32(CHUNK as u32)];
        heads.launch(q, "fwd", grid, inputs.into_iter().chain(outputs))?;
        let arguments = [at(&parts, F32)?, at(&sums, F32)?, at(&y, t)?, Arg::U32(chunks as u32)];
        heads.launch(q, "combine", Grid::of(blocks(q.elem_count())), arguments)?;
    }
    Ok((y, sums))
}

/// The gradients of `q`, `k` and `v`, given the result `y` of [`attention`], its sums and its gradient.
///
/// # Errors
/// Heads of more than 256 elements, or a tensor operation failed.
pub(in crate::tensor) fn attention_backward(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    [y, sums, g]: [&Tensor; 3],
    mask: &AttentionMask,
) -> Result<[Tensor; 3]> {
    let heads = Heads::new(shape, q.dtype(), mask)?;
    let (t, Sizes { warps, backward, .. }) = (heads.dtype, heads.sizes);
    let owned = warps * STRIP;
    let g = g.contiguous()?;
    let dots = fresh(q, (shape.query, heads.tokens()), F32)?;
    let one_each = Grid::of(blocks(32 * dots.elem_count()));
    heads.launch(q, "dots", one_each, [at(y, t)?, at(&g, t)?, at(&dots, F32)?])?;
    let inputs = || -> Result<_> {
        let inputs = [at(&mask.table, U32)?, at(q, t)?, at(k, t)?, at(v, t)?, at(&g, t)?, at(sums, F32)?];
        Ok(inputs.into_iter().chain([at(&dots, F32)?]))
    };
    let [dq, dk, dv] = [fresh(q, q.shape(), t)?, fresh(k, k.shape(), t)?, fresh(v, v.shape(), t)?];
    let grid = |blocks| heads.grid(blocks, warps, 2 * owned + 4 * backward);
    heads.launch(q, "dq", grid(heads.rows().div_ceil(owned)), inputs()?.chain([at(&dq, t)?]))?;
    // Of the widest heads a block has registers for half the columns.
    let tiles = heads.longest[0].div_ceil(owned) * heads.tile.div_ceil(128);
    heads.launch(q, "dkdv", grid(tiles), inputs()?.chain([at(&dk, t)?, at(&dv, t)?]))?;
    Ok([dq, dk, dv])
}
