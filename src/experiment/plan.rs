//! Capacity planning: which budgets meet objectives, and up to which rate.
//!
//! Each budget is simulated on the same traces (common random numbers), one a seed; an objective holds
//! of a budget when the upper end of the 95 % interval over the traces is within the bound. Traces are
//! replicates, requests of one trace are not: they queue behind each other.

use rayon::prelude::*;
use serde::Serialize;

use super::EngineSettings;
use super::simulate::{SimulateError, Simulator, is_saturated};
use super::slo::Slo;
use crate::report::binds::Binds;
use crate::report::results::{ResultRow, RunContext, Source};
use crate::report::stats::{Interval, mean, mean_interval};
use crate::workload::pool::PromptPool;
use crate::workload::spec::{Amount, Requests, WorkloadError, WorkloadSpec};

/// Of the intervals.
const CONFIDENCE: f64 = 0.95;
/// Halvings of the interval in which the highest rate lies: to a thousandth of the saturation rate.
const HALVINGS: u32 = 10;

/// A plan that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The profile or the settings.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
}

/// What is asked.
#[derive(Debug)]
pub struct Planner<'a> {
    /// The machine.
    pub simulator: &'a Simulator,
    /// Prompt lengths.
    pub pool: &'a PromptPool,
    /// The workload; its rate, amount and seed are set for each run.
    pub workload: WorkloadSpec,
    /// The engine; its budget is set for each run.
    pub engine: EngineSettings,
    /// The objectives: all must hold.
    pub slos: Vec<Slo>,
    /// Requests in a trace.
    pub requests: u64,
    /// Traces, of seeds `workload.seed`, `+ 1` …; at least 2.
    pub seeds: u64,
}

/// Whether objectives hold of a budget at a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// With confidence.
    Holds,
    /// One does not, with confidence.
    Fails,
    /// The interval has the bound in it: more traces or longer ones would tell.
    Undecided,
    /// The rate is more than the budget sustains: whatever a finite trace shows, waits grow for ever.
    Saturated,
    /// So many slots leave no memory for a request.
    #[serde(rename = "does not fit")]
    DoesNotFit,
}

/// One objective's statistic over the traces.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Seen {
    /// The statistic's column.
    pub metric: &'static str,
    /// Mean over traces, seconds.
    pub mean_s: f64,
    /// 95 % interval of that mean.
    pub interval_s: Interval,
}

/// A budget's answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BudgetPlan {
    /// The budget.
    pub gpu_loras: u32,
    /// The highest rate that a saturated engine works off, requests a second; none if the budget does not fit.
    pub saturation_rate: Option<f64>,
    /// The highest rate at which the objectives hold with confidence; none if they hold at no rate.
    pub highest_rate: Option<f64>,
    /// At the rate asked about; without one none, unless the budget does not fit.
    pub verdict: Option<Verdict>,
    /// Likewise, one an objective.
    pub seen: Vec<Seen>,
    /// What binds at the rate asked about, or without one at the highest rate.
    pub binds: Option<Binds>,
}

/// The plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// One a budget, ascending.
    pub budgets: Vec<BudgetPlan>,
    /// The smallest budget that holds, with confidence, at the rate asked about.
    pub smallest: Option<u32>,
    /// The budget with the least first objective at that rate; without a rate, with the highest rate.
    pub best: Option<u32>,
}

impl BudgetPlan {
    fn does_not_fit(gpu_loras: u32) -> Self {
        let verdict = Some(Verdict::DoesNotFit);
        Self { gpu_loras, saturation_rate: None, highest_rate: None, verdict, seen: Vec::new(), binds: None }
    }
}

impl Planner<'_> {
    /// Answers for these budgets, at `rate` if there is one; `done` is told of each that is.
    ///
    /// # Errors
    /// If the workload or the settings are impossible, or no budget fits into the profile's memory.
    pub fn plan(
        &self,
        budgets: &[u32],
        rate: Option<f64>,
        done: impl Fn() + Sync,
    ) -> Result<Plan, PlanError> {
        if let Some(&least) = budgets.iter().min() {
            self.simulator.config(&self.engine(least))?;
        }
        let plan = |&budget: &u32| {
            let plan = match self.budget(budget, rate) {
                Err(PlanError::Simulate(e)) if e.is_of_the_budget() => Ok(BudgetPlan::does_not_fit(budget)),
                plan => plan,
            };
            done();
            plan
        };
        let plans: Vec<BudgetPlan> = budgets.par_iter().map(plan).collect::<Result<_, _>>()?;
        let holds = |b: &&BudgetPlan| b.verdict == Some(Verdict::Holds);
        let least = |a: &&BudgetPlan, b: &&BudgetPlan| match rate {
            Some(_) => a.seen[0].mean_s.total_cmp(&b.seen[0].mean_s),
            None => b.highest_rate.unwrap_or(0.0).total_cmp(&a.highest_rate.unwrap_or(0.0)),
        };
        let sound = |b: &&BudgetPlan| match rate {
            Some(_) => !matches!(b.verdict, Some(Verdict::Saturated | Verdict::DoesNotFit)),
            None => b.highest_rate.is_some(),
        };
        Ok(Plan {
            smallest: plans.iter().find(holds).map(|b| b.gpu_loras),
            // Of equal ones the smallest, which comes first.
            best: plans.iter().filter(sound).min_by(least).map(|b| b.gpu_loras),
            budgets: plans,
        })
    }

    fn engine(&self, gpu_loras: u32) -> EngineSettings {
        EngineSettings { gpu_loras, ..self.engine.clone() }
    }

    fn budget(&self, gpu_loras: u32, rate: Option<f64>) -> Result<BudgetPlan, PlanError> {
        let engine = self.engine(gpu_loras);
        let saturation_rate = self.simulator.saturation_rate_of(&engine, &self.workload, self.pool)?;
        let highest = self.highest_rate(&engine, saturation_rate)?;
        let asked = rate.map(|rate| self.rows(&engine, rate)).transpose()?;
        let verdict = match (rate, &asked) {
            (Some(rate), _) if is_saturated(rate, saturation_rate) => Some(Verdict::Saturated),
            (_, Some(rows)) => Some(self.verdict(rows)),
            _ => None,
        };
        Ok(BudgetPlan {
            gpu_loras,
            saturation_rate: Some(saturation_rate),
            highest_rate: highest.as_ref().map(|h| h.0),
            verdict,
            seen: asked.as_deref().map_or_else(Vec::new, |rows| self.seen(rows)),
            binds: asked.as_ref().or(highest.as_ref().map(|h| &h.1)).and_then(|rows| Binds::of(rows.iter())),
        })
    }

    /// By halving: objectives are taken to hold at every rate under one at which they hold, which
    /// common random numbers (the same trace, stretched) make true but for ties.
    fn highest_rate(
        &self,
        engine: &EngineSettings,
        saturation_rate: f64,
    ) -> Result<Option<(f64, Vec<ResultRow>)>, PlanError> {
        let (mut low, mut high) = (0.0, 0.95 * saturation_rate);
        // The end of the range first: often it holds there.
        let rows = self.rows(engine, high)?;
        if self.verdict(&rows) == Verdict::Holds {
            return Ok(Some((high, rows)));
        }
        let mut best = None;
        for _ in 0..HALVINGS {
            let rate = (low + high) / 2.0;
            let rows = self.rows(engine, rate)?;
            if self.verdict(&rows) == Verdict::Holds {
                low = rate;
                best = Some((rate, rows));
            } else {
                high = rate;
            }
        }
        Ok(best)
    }

    /// A row a seed.
    fn rows(&self, engine: &EngineSettings, rate: f64) -> Result<Vec<ResultRow>, PlanError> {
        let context = RunContext::new(
            Source::Simulated,
            engine.total_loras,
            engine.gpu_loras,
            self.workload.regime.as_str(),
        );
        let row = |seed| {
            let workload = self.workload(rate, self.workload.seed + seed);
            let requests = Requests::new(&workload, self.pool)?;
            Ok(self.simulator.stream(engine, requests, (self.requests as usize, 0), &context)?)
        };
        (0..self.seeds).into_par_iter().map(row).collect()
    }

    fn workload(&self, rate: f64, seed: u64) -> WorkloadSpec {
        WorkloadSpec { rate, seed, amount: Amount::Requests(self.requests), ..self.workload.clone() }
    }

    fn seen(&self, rows: &[ResultRow]) -> Vec<Seen> {
        let seen = |slo: &Slo| {
            let values: Vec<f64> = rows.iter().filter_map(|r| slo.of(r)).collect();
            let mean_s = mean(&values)?;
            Some(Seen {
                metric: slo.metric(),
                mean_s,
                interval_s: mean_interval(&values, CONFIDENCE)
                    .unwrap_or(Interval { low: f64::NEG_INFINITY, high: f64::INFINITY }),
            })
        };
        self.slos.iter().filter_map(seen).collect()
    }

    fn verdict(&self, rows: &[ResultRow]) -> Verdict {
        let seen = self.seen(rows);
        let within = |(slo, seen): (&Slo, &Seen)| seen.interval_s.high < slo.limit_s;
        let beyond = |(slo, seen): (&Slo, &Seen)| seen.interval_s.low >= slo.limit_s;
        if self.slos.iter().zip(&seen).all(within) {
            Verdict::Holds
        } else if self.slos.iter().zip(&seen).any(beyond) {
            Verdict::Fails
        } else {
            Verdict::Undecided
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Profile;
    use crate::profile::tests::round;
    use crate::workload::arrivals::Arrivals;
    use crate::workload::popularity::Popularity;
    use crate::workload::regime::Regime;

    fn plan(slo: &str, budgets: &[u32], rate: Option<f64>) -> Plan {
        plan_on(round(), slo, budgets, rate).unwrap()
    }

    fn plan_on(profile: Profile, slo: &str, budgets: &[u32], rate: Option<f64>) -> Result<Plan, PlanError> {
        let pool = PromptPool::embedded(Regime::Short);
        let planner = Planner {
            simulator: &Simulator::new(profile).unwrap(),
            pool: &pool,
            workload: WorkloadSpec {
                regime: Regime::Short,
                arrivals: Arrivals::Poisson,
                rate: 1.0,
                popularity: Popularity::Uniform,
                total_loras: 128,
                amount: Amount::Requests(1),
                max_tokens: 16,
                seed: 1,
                ranks: vec![8],
            },
            engine: EngineSettings { model: "tiny".to_owned(), ..EngineSettings::default() },
            slos: vec![slo.parse().unwrap()],
            requests: 400,
            seeds: 6,
        };
        planner.plan(budgets, rate, || ())
    }

    #[test]
    fn the_smallest_budget_that_holds_is_the_one_whose_next_smaller_does_not() {
        let budgets = [2, 4, 8, 16, 32];
        let loose = plan("ttft_median<10s", &budgets, Some(20.0));
        assert_eq!(loose.smallest, Some(2));
        let tight = plan("ttft_median<60ms", &budgets, Some(40.0));
        let smallest = tight.smallest.expect("some budget holds");
        assert!(smallest > 2, "{tight:?}");
        for b in &tight.budgets {
            let holds = b.verdict == Some(Verdict::Holds);
            assert_eq!(holds, b.gpu_loras >= smallest, "{b:?}");
            // The highest rate says the same: it is above the rate asked about where the SLO holds.
            assert_eq!(holds, b.highest_rate.unwrap_or(0.0) >= 40.0, "{b:?}");
        }
        assert_eq!(plan("ttft_median<1us", &budgets, Some(20.0)).smallest, None);
    }

    #[test]
    fn the_highest_rate_rises_with_the_budget_and_stays_under_saturation() {
        let plan = plan("ttft_p90<200ms", &[2, 8, 32], None);
        let rates: Vec<f64> = plan.budgets.iter().map(|b| b.highest_rate.unwrap()).collect();
        assert!(rates.is_sorted() && rates[0] < rates[2], "{rates:?}");
        assert!(
            plan.budgets.iter().all(|b| b.highest_rate.unwrap() <= 0.95 * b.saturation_rate.unwrap() + 1e-9)
        );
        assert_eq!((plan.best, plan.smallest), (Some(32), None));
        assert_eq!(plan.budgets[0].binds, Some(Binds::Slot));
    }

    #[test]
    fn a_saturated_budget_never_holds() {
        let plan = plan("ttft_median<100s", &[2], Some(1_000.0));
        assert_eq!((plan.budgets[0].verdict, plan.smallest), (Some(Verdict::Saturated), None));
    }

    #[test]
    fn a_budget_without_room_is_an_answer_beside_those_that_fit() {
        let mut small = round();
        small.engine.memory_bytes = Some((1 << 25) + 16_000_000 + 300 * (1 << 14));
        small.engine.kv_memory_bytes = None;
        let of = |budgets: &[u32], rate| plan_on(small.clone(), "ttft_median<10s", budgets, rate);
        for rate in [Some(5.0), None] {
            let plan = of(&[8, 16, 32], rate).unwrap();
            let fits = |b: &BudgetPlan| b.verdict != Some(Verdict::DoesNotFit);
            assert_eq!(plan.budgets.iter().map(fits).collect::<Vec<_>>(), [true, true, false]);
            assert_eq!((plan.budgets[2].saturation_rate, plan.budgets[2].highest_rate), (None, None));
            assert!(plan.best.is_some_and(|b| b < 32), "{plan:?}");
        }
        assert_eq!(of(&[8, 16, 32], Some(5.0)).unwrap().smallest, Some(8));
        let none = of(&[32, 64], Some(5.0)).unwrap_err().to_string();
        assert!(none.contains("32 slots leave no room"), "{none}");
    }
}
