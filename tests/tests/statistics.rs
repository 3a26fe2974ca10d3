//! The rule for differences keeps its promise: false alarms in at most 5 % of the cases, whatever varies.

use titer::stats::ALPHA;
use titer_tests::simulation::{DESIGNS, SCENARIOS, simulate};

/// Experiments for each figure.
const COUNT: usize = 150;

/// The most that a rate of 5 % shows in so many experiments, by three standard deviations.
fn bound() -> f64 {
    ALPHA + 3. * (ALPHA * (1. - ALPHA) / COUNT as f64).sqrt()
}

#[test]
fn false_alarms_are_as_rare_as_promised() {
    for design in DESIGNS {
        for scenario in SCENARIOS {
            let rates = simulate(design, scenario, false, COUNT);
            assert!(rates.single <= bound() && rates.family <= bound(), "{design:?}, {}: {rates:?}", scenario.name);
        }
    }
}

#[test]
fn the_simulation_catches_a_rule_that_errs() {
    // Seeds on the same base taken for independent; and ten runs that agree about the prompts that they share.
    for (design, scenario) in [((5, 3), SCENARIOS[0]), ((1, 10), SCENARIOS[2])] {
        let rates = simulate(design, scenario, false, COUNT);
        assert!(rates.runs_as_units > bound(), "{design:?}: {rates:?}");
    }
}

#[test]
fn a_large_effect_is_found_where_the_units_allow_it() {
    let found = |design| simulate(design, SCENARIOS[0], true, COUNT);
    assert_eq!(found((1, 3)).first, 0., "no p value below 0.25 exists");
    assert_eq!(found((5, 3)).first, 0., "nor below 0.0625");
    assert!(found((6, 1)).first > 0.8, "{:?}", found((6, 1)));
    assert!(found((10, 1)).first_corrected > 0.8, "{:?}", found((10, 1)));
    assert!(found((1, 10)).first_corrected > 0.8, "{:?}", found((1, 10)));
}
