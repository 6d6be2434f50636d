//! Choosing tokens from logits, as vLLM documents it: penalties, bans, temperature, top-k, top-p.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::engine::executor::{Sampling, TokenId, TokenLogprobs};

/// Below this a temperature means greedy.
const GREEDY: f32 = 1e-5;

/// What a running sequence's sampling needs from token to token.
#[derive(Debug)]
pub(in crate::engine) struct SeqSampler {
    how: Sampling,
    rng: ChaCha8Rng,
    /// Tokens in the output.
    generated: u32,
    /// How often the output has each token that it has; kept only where a penalty needs it.
    counts: Vec<(TokenId, u32)>,
    /// Of the last sampled token, where they are asked for.
    logprobs: Option<Box<TokenLogprobs>>,
}

impl SeqSampler {
    /// A sampler; one random draw has been used up for each token that is generated already.
    pub fn new(how: Sampling) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(how.seed);
        rng.set_word_pos(2 * how.generated.len() as u128);
        let mut sampler = Self { rng, generated: 0, counts: Vec::new(), logprobs: None, how };
        for token in std::mem::take(&mut sampler.how.generated) {
            sampler.note(token);
        }
        sampler
    }

    /// Whether its next token is simply the likeliest allowed one.
    #[cfg(feature = "cuda")]
    pub fn is_plain(&self) -> bool {
        self.how.temperature < GREEDY
            && !self.penalised()
            && self.generated >= self.how.min_tokens
            && self.how.logprobs.is_none()
    }

    fn penalised(&self) -> bool {
        self.how.presence_penalty != 0.0 || self.how.frequency_penalty != 0.0
    }

    /// The output has one more token.
    pub fn note(&mut self, token: TokenId) {
        self.generated += 1;
        if self.penalised() {
            match self.counts.iter_mut().find(|(t, _)| *t == token) {
                Some((_, n)) => *n += 1,
                None => self.counts.push((token, 1)),
            }
        }
    }

    /// Chooses a token. `logits` is changed; `allowed`, if given, says which ids may come out;
    /// `scratch` is reused from call to call.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        allowed: Option<&[bool]>,
        scratch: &mut Vec<(f32, TokenId)>,
    ) -> TokenId {
        let raw =
            self.how.logprobs.map(|top| (Distribution::of(logits, top as usize, scratch), logits.to_vec()));
        for (token, n) in &self.counts {
            logits[*token as usize] -= self.how.presence_penalty + *n as f32 * self.how.frequency_penalty;
        }
        if self.generated < self.how.min_tokens {
            for token in &self.how.banned_before_min {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(allowed) = allowed {
            for (logit, allowed) in logits.iter_mut().zip(allowed) {
                if !allowed {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let token = if self.how.temperature < GREEDY {
            argmax(logits)
        } else {
            // Drawn first, so that one token takes one draw whatever the logits are.
            let u = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            self.draw(logits, u, scratch)
        };
        self.note(token);
        self.logprobs = raw.map(|(distribution, raw)| Box::new(distribution.tell(raw[token as usize])));
        token
    }

    /// Of the token that [`Self::sample`] has just chosen, where they are asked for.
    pub fn take_logprobs(&mut self) -> Option<Box<TokenLogprobs>> {
        self.logprobs.take()
    }

    fn draw(&self, logits: &[f32], u: f64, scratch: &mut Vec<(f32, TokenId)>) -> TokenId {
        scratch.clear();
        scratch.extend(
            logits
                .iter()
                .zip(0..)
                .filter(|(logit, _)| **logit > f32::NEG_INFINITY)
                .map(|(logit, id)| (*logit, id)),
        );
        if scratch.is_empty() {
            return argmax(logits);
        }
        let k = self.how.top_k as usize;
        if k > 0 && k < scratch.len() {
            scratch.select_nth_unstable_by(k - 1, by_logit);
            scratch.truncate(k);
        }
        scratch.sort_unstable_by(by_logit);
        let top = scratch[0].0;
        let mut total = 0.0f64;
        for (value, _) in scratch.iter_mut() {
            *value = ((*value - top) / self.how.temperature).exp();
            total += f64::from(*value);
        }
        if self.how.top_p < 1.0 {
            let enough = f64::from(self.how.top_p) * total;
            let mut kept = 0.0;
            let cut = scratch.iter().position(|(p, _)| {
                kept += f64::from(*p);
                kept >= enough
            });
            if let Some(last) = cut {
                scratch.truncate(last + 1);
                total = kept;
            }
        }
        let mut left = u * total;
        for (p, id) in scratch.iter() {
            left -= f64::from(*p);
            if left < 0.0 {
                return *id;
            }
        }
        scratch[scratch.len() - 1].1
    }
}

/// What there is to tell of a token's logits once it is chosen.
struct Distribution {
    /// The logarithm of Σ exp over the logits.
    log_sum: f64,
    top: Vec<(TokenId, f32)>,
}

impl Distribution {
    fn of(logits: &[f32], top: usize, scratch: &mut Vec<(f32, TokenId)>) -> Self {
        let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let log_sum = most + logits.iter().map(|&l| (f64::from(l) - most).exp()).sum::<f64>().ln();
        scratch.clear();
        scratch.extend(logits.iter().copied().zip(0..));
        let top = top.min(scratch.len());
        if top < scratch.len() {
            scratch.select_nth_unstable_by(top, by_logit);
            scratch.truncate(top);
        }
        scratch.sort_unstable_by(by_logit);
        let top = scratch.iter().map(|&(logit, id)| (id, logprob(logit, log_sum))).collect();
        Self { log_sum, top }
    }

    fn tell(self, chosen: f32) -> TokenLogprobs {
        TokenLogprobs { chosen: logprob(chosen, self.log_sum), top: self.top }
    }
}

fn logprob(logit: f32, log_sum: f64) -> f32 {
    (f64::from(logit) - log_sum) as f32
}

/// The largest first; of equals the lower id.
fn by_logit(a: &(f32, TokenId), b: &(f32, TokenId)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The index of the largest; the lowest such on ties.
fn argmax(logits: &[f32]) -> TokenId {
    let (mut best, mut at) = (f32::NEG_INFINITY, 0);
    for (i, logit) in logits.iter().enumerate() {
        if *logit > best {
            (best, at) = (*logit, i);
        }
    }
    at as TokenId
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(how: Sampling, logits: &[f32], allowed: Option<&[bool]>, n: usize) -> Vec<TokenId> {
        let mut sampler = SeqSampler::new(how);
        (0..n).map(|_| sampler.sample(&mut logits.to_vec(), allowed, &mut Vec::new())).collect()
    }

    fn hot() -> Sampling {
        Sampling { temperature: 1.0, seed: 5, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_lowest_of_the_best() {
        assert_eq!(tokens(Sampling::default(), &[1.0, 3.0, 3.0, 2.0], None, 2), [1, 1]);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, (3f32).ln(), f32::NEG_INFINITY];
        let drawn = tokens(hot(), &logits, None, 4000);
        let ones = drawn.iter().filter(|t| **t == 1).count() as f64 / 4000.0;
        assert!((ones - 0.75).abs() < 0.03, "{ones}");
        assert!(!drawn.contains(&2));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let seen = |how| {
            let mut t = tokens(how, &logits, None, 500);
            t.sort_unstable();
            t.dedup();
            t
        };
        assert_eq!(seen(Sampling { top_k: 2, ..hot() }), [0, 1]);
        assert_eq!(seen(Sampling { top_p: 0.79, ..hot() }), [0, 1]);
        assert_eq!(seen(Sampling { top_p: 0.81, ..hot() }), [0, 1, 2]);
        assert_eq!(seen(Sampling { top_p: 0.01, ..hot() }), [0]);
        assert_eq!(seen(hot()), [0, 1, 2, 3]);
    }

    #[test]
    fn penalties_and_bans_move_the_choice() {
        let logits = [2.0, 1.0, 0.5];
        let presence = Sampling { presence_penalty: 1.2, ..Sampling::default() };
        assert_eq!(tokens(presence, &logits, None, 3), [0, 1, 0]);
        let frequency = Sampling { frequency_penalty: 0.6, ..Sampling::default() };
        assert_eq!(tokens(frequency, &logits, None, 4), [0, 0, 1, 0]);
        let banned = Sampling { min_tokens: 2, banned_before_min: vec![0, 99], ..Sampling::default() };
        assert_eq!(tokens(banned, &logits, None, 3), [1, 1, 0]);
        assert_eq!(tokens(Sampling::default(), &logits, Some(&[false, false, true]), 1), [2]);
    }

    #[test]
    fn logprobs_are_those_of_the_model_whatever_is_made_of_them() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln() + 7.0).collect();
        let how = Sampling { logprobs: Some(2), presence_penalty: 2.0, temperature: 0.0, ..hot() };
        let mut sampler = SeqSampler::new(how);
        for expected in [1, 3] {
            let allowed = [true, true, false, true];
            let token = sampler.sample(&mut logits.clone(), Some(&allowed), &mut Vec::new());
            assert_eq!(token, expected);
            let told = sampler.take_logprobs().unwrap();
            assert!((told.chosen.exp() - [0.0, 0.4, 0.0, 0.3][token as usize]).abs() < 1e-6);
            let top: Vec<_> = told.top.iter().map(|(id, p)| (*id, (p.exp() * 10.0).round() as u32)).collect();
            assert_eq!(top, [(1, 4), (3, 3)]);
        }
        let told = |logprobs| {
            let mut sampler = SeqSampler::new(Sampling { logprobs, ..Sampling::default() });
            sampler.sample(&mut logits.clone(), None, &mut Vec::new());
            sampler.take_logprobs().map(|told| told.top.len())
        };
        assert_eq!([told(None), told(Some(0)), told(Some(9))], [None, Some(0), Some(4)]);
    }

    #[test]
    fn a_preempted_sequence_goes_on_where_it_was() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.1).collect();
        let how = Sampling { frequency_penalty: 0.4, ..hot() };
        let whole = tokens(how.clone(), &logits, None, 20);
        let resumed = tokens(Sampling { generated: whole[..8].to_vec(), ..how }, &logits, None, 12);
        assert_eq!(resumed, whole[8..]);
        assert_ne!(
            tokens(Sampling { seed: 6, ..hot() }, &logits, None, 20),
            tokens(hot(), &logits, None, 20)
        );
    }
}
