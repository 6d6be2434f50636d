//! Scales, ticks and how numbers are written at them.

/// A linear or logarithmic scale over positive or zero-based values.
#[derive(Clone, Debug, PartialEq)]
pub struct Scale {
    /// Whether distances are ratios.
    pub log: bool,
    /// Least value shown.
    pub low: f64,
    /// Greatest value shown.
    pub high: f64,
    /// Where grid lines and labels stand.
    pub ticks: Vec<f64>,
}

/// A range that spans more than this many times its least value is drawn logarithmically.
const LOG_FROM: f64 = 20.0;
/// Room on both ends of a logarithmic scale.
const LOG_AIR: f64 = 1.3;

impl Scale {
    /// A scale that shows all of `values`: logarithmic if they are positive and span enough, else
    /// linear from zero with up to `steps` ticks above it. Values that are not finite are not looked at.
    pub fn covering(values: impl Iterator<Item = f64>, may_be_log: bool, steps: u32) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for value in values.filter(|v| v.is_finite()) {
            low = low.min(value);
            high = high.max(value);
        }
        if may_be_log && low > 0.0 && high > LOG_FROM * low {
            Self::log(low, high)
        } else {
            Self::linear(high, steps)
        }
    }

    /// The range with some air, ticks at its 1-2-5 steps.
    fn log(low: f64, high: f64) -> Self {
        let (low, high) = (low / LOG_AIR, high * LOG_AIR);
        let ticks: Vec<f64> = steps_125().filter(|s| (low..=high).contains(s)).collect();
        // Over many decades the decades alone are enough.
        let ticks =
            if ticks.len() > 11 { ticks.into_iter().filter(|t| is_decade(*t)).collect() } else { ticks };
        Self { log: true, low, high, ticks }
    }

    fn linear(high: f64, steps: u32) -> Self {
        let high = if high > 0.0 { high } else { 1.0 };
        let step = steps_125().find(|s| high * 1.05 / s <= f64::from(steps)).unwrap_or(high);
        let high = high * 1.05;
        let ticks = (0..=(high / step) as u32).map(|i| f64::from(i) * step).collect();
        Self { log: false, low: 0.0, high, ticks }
    }

    /// Where a value stands, 0 at the lower end and 1 at the upper; clamped to them.
    pub fn place(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        share.clamp(0.0, 1.0)
    }
}

/// 1, 2 and 5 times every power of ten from 1e-9 to 1e9, each the nearest number to its decimal text.
fn steps_125() -> impl Iterator<Item = f64> {
    (-9..=9).flat_map(|e: i32| {
        [1.0, 2.0, 5.0].map(|m| if e < 0 { m / 10f64.powi(-e) } else { m * 10f64.powi(e) })
    })
}

fn is_decade(value: f64) -> bool {
    (value.log10() - value.log10().round()).abs() < 1e-9
}

/// Seconds as people write them: `0`, `50 µs`, `2.5 ms`, `300 ms`, `1.2 s`.
pub fn seconds(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        0.0 => return "0".to_owned(),
        v if v < 0.999_5e-3 => (value * 1e6, "µs"),
        v if v < 0.999_5 => (value * 1e3, "ms"),
        _ => (value, "s"),
    };
    format!("{} {unit}", number(scaled))
}

/// Three significant digits, without zeros that say nothing.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 99.95 || v == 0.0 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_range_is_logarithmic_and_a_narrow_one_is_not() {
        let wide = Scale::covering([0.03, 1.7].into_iter(), true, 5);
        assert!(wide.log);
        assert_eq!(wide.ticks, [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]);
        let narrow = Scale::covering([0.03, 0.17].into_iter(), true, 5);
        assert_eq!((narrow.log, narrow.low), (false, 0.0));
        assert_eq!(narrow.ticks.last().map(|t| (t * 100.0).round()), Some(15.0));
        assert!(!Scale::covering([0.0, 500.0].into_iter(), true, 5).log);
    }

    #[test]
    fn every_value_has_a_place_between_the_ends() {
        for scale in
            [Scale::covering([0.001, 30.0].into_iter(), true, 5), Scale::covering([3.0].into_iter(), true, 5)]
        {
            for value in [0.0, 0.001, 3.0, 30.0] {
                assert!((0.0..=1.0).contains(&scale.place(value)));
            }
            assert!(scale.place(3.0) > 0.0 && scale.place(3.0) < 1.0);
        }
        assert!(Scale::covering(std::iter::empty(), true, 5).high > 0.0);
    }

    #[test]
    fn numbers_read_as_people_write_them() {
        let written = [0.0, 0.000_05, 0.0025, 0.3, 0.9999, 1.2, 20.0, 120.0].map(seconds);
        assert_eq!(written, ["0", "50 µs", "2.5 ms", "300 ms", "1 s", "1.2 s", "20 s", "120 s"]);
        assert_eq!([0.5, 2.0, 1234.0].map(number), ["0.5", "2", "1234"]);
    }
}
