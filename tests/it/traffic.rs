//! Random traffic for an engine: bursts and pauses, callers that leave in every phase, and what became of each.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lora_hbm::engine::{Engine, Finish, GenerateHandle, GenerateParams, GenerateRequest};
use lora_sched::{AdapterId, RequestId};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;

/// Requests that may be open at once; more wait for one to end.
const MOST_OPEN: usize = 120;

/// What a random load is made of.
pub struct Traffic {
    pub seed: u64,
    pub length: Length,
    pub adapters: u32,
    /// Ids that prompts are made of.
    pub tokens: Range<u32>,
    pub longest_prompt: usize,
    pub longest_output: u32,
    /// The longest pause between bursts.
    pub pause: Duration,
    /// The longest time after which a caller leaves that waits for no token.
    pub patience: Duration,
}

/// When a load ends.
#[derive(Clone, Copy)]
pub enum Length {
    Requests(usize),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "CI counts; a GPU's load lasts"))]
    Time(Duration),
}

/// When a caller leaves before its output's end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Leaves {
    Never,
    After(Duration),
    AtToken(usize),
}

/// What became of a request.
#[derive(Debug)]
pub struct Fate {
    pub id: RequestId,
    pub request: GenerateRequest,
    pub text: String,
    pub tokens: Vec<u32>,
    /// First tokens that came with an account of the time.
    pub firsts: usize,
    /// None if the caller left before.
    pub finish: Option<Finish>,
    /// Whether the caller may have left.
    pub leaves: bool,
    pub refused: Option<String>,
}

impl Fate {
    /// Whether its output depends on nothing but the request: it ended by itself, and nothing was drawn
    /// from a stream that depends on its number.
    pub fn is_repeatable(&self) -> bool {
        self.finish.is_some()
            && (self.request.params.temperature == 0.0 || self.request.params.seed.is_some())
    }

    /// Says what is wrong with its output's length, if anything.
    pub fn check(&self) {
        let Self { id, request, tokens, finish, leaves, refused, text, firsts } = self;
        let params = &request.params;
        assert_eq!(*refused, None, "request {id} was refused");
        assert!(finish.is_some() || *leaves, "request {id} never ended");
        assert!(tokens.len() <= params.max_tokens as usize, "request {id}: {} tokens", tokens.len());
        // The account comes with the first token, once.
        assert_eq!(*firsts, usize::from(!tokens.is_empty()), "request {id}: accounts of a first token");
        match finish {
            None => {}
            Some(Finish::Length) => assert_eq!(tokens.len(), params.max_tokens as usize, "request {id}"),
            Some(Finish::Stop) => {
                assert!(!params.ignore_eos || !params.stop.is_empty(), "request {id}: nothing could stop it");
            }
            Some(Finish::Abort) => panic!("request {id} was aborted"),
        }
        for stop in params.stop.iter() {
            assert!(!text.contains(stop), "request {id}: {text:?} holds its stop string {stop:?}");
        }
    }
}

/// Sends the load and waits until every caller has its output or has left.
pub fn drive(engine: &Engine, traffic: &Traffic) -> Vec<Fate> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut rng = ChaCha8Rng::seed_from_u64(traffic.seed);
        let (mut sent, mut fates, mut open) = (0, Vec::new(), JoinSet::new());
        let begun = Instant::now();
        let over = |sent: usize| match traffic.length {
            Length::Requests(requests) => sent >= requests,
            Length::Time(time) => begun.elapsed() >= time,
        };
        while !over(sent) {
            // Mostly few at a time; now and then more than there are places.
            let burst = if rng.random_bool(0.1) { rng.random_range(10..40) } else { rng.random_range(1..6) };
            for _ in 0..burst {
                let request = traffic.request(&mut rng);
                let leaves = traffic.leaves(&mut rng, request.params.max_tokens);
                let handle = engine.submit(request.clone()).unwrap();
                open.spawn(follow(handle, request, leaves));
                sent += 1;
            }
            // A pause so long that the engine falls idle happens too.
            let pause = traffic.pause.mul_f64(rng.random::<f64>().powi(2));
            tokio::time::sleep(if rng.random_bool(0.05) { pause * 10 } else { pause }).await;
            while open.len() > MOST_OPEN {
                fates.extend(open.join_next().await.map(Result::unwrap));
            }
            while let Some(fate) = open.try_join_next() {
                fates.push(fate.unwrap());
            }
        }
        while let Some(fate) = open.join_next().await {
            fates.push(fate.unwrap());
        }
        fates.sort_by_key(|f| f.id);
        fates
    })
}

impl Traffic {
    fn request(&self, rng: &mut ChaCha8Rng) -> GenerateRequest {
        // Mostly short, some as long as may be; of one token, too.
        let share = |rng: &mut ChaCha8Rng| rng.random::<f64>().powi(3);
        let prompt = 1 + (share(rng) * self.longest_prompt as f64) as usize;
        let max_tokens = 1 + (share(rng) * f64::from(self.longest_output)) as u32;
        let prompt =
            (0..prompt.min(self.longest_prompt)).map(|_| rng.random_range(self.tokens.clone())).collect();
        // Low numbers are popular, so that some adapters stay and others come and go.
        let popular = (rng.random::<f64>().powi(2) * f64::from(self.adapters)) as u32;
        let adapter = rng.random_bool(0.85).then_some(AdapterId(popular.min(self.adapters - 1)));
        let sampled = rng.random_bool(0.3);
        let stop =
            if rng.random_bool(0.1) { ["e".to_owned(), "qq".to_owned()].into() } else { Arc::default() };
        let params = GenerateParams {
            max_tokens: max_tokens.min(self.longest_output),
            temperature: if sampled { 0.8 } else { 0.0 },
            seed: (sampled && rng.random_bool(0.8)).then(|| rng.random_range(0..1000)),
            ignore_eos: rng.random_bool(0.8),
            stop,
            ..GenerateParams::default()
        };
        GenerateRequest { prompt, adapter, params, received: None }
    }

    fn leaves(&self, rng: &mut ChaCha8Rng, max_tokens: u32) -> Leaves {
        match rng.random_range(0..10) {
            0 => Leaves::After(Duration::ZERO),
            1 | 2 => Leaves::After(self.patience.mul_f64(rng.random())),
            3 => Leaves::AtToken(rng.random_range(1..=max_tokens as usize)),
            _ => Leaves::Never,
        }
    }
}

/// Takes a request's output until its end or until the caller leaves, which drops the handle.
async fn follow(mut handle: GenerateHandle, request: GenerateRequest, leaves: Leaves) -> Fate {
    let mut fate = Fate {
        id: handle.id(),
        request,
        text: String::new(),
        tokens: Vec::new(),
        firsts: 0,
        finish: None,
        leaves: leaves != Leaves::Never,
        refused: None,
    };
    match leaves {
        Leaves::Never => read(&mut handle, &mut fate, usize::MAX).await,
        Leaves::AtToken(tokens) => read(&mut handle, &mut fate, tokens).await,
        Leaves::After(time) => {
            // Its time having come is no failure.
            let _ = tokio::time::timeout(time, read(&mut handle, &mut fate, usize::MAX)).await;
        }
    }
    fate
}

async fn read(handle: &mut GenerateHandle, fate: &mut Fate, most: usize) {
    if let Err(e) = handle.admitted().await {
        fate.refused = Some(e.to_string());
        return;
    }
    while let Some(delta) = handle.next().await {
        assert_eq!(fate.finish, None, "request {} goes on after its end", fate.id);
        fate.text.push_str(&delta.text);
        fate.tokens.extend(delta.token);
        fate.firsts += usize::from(delta.first.is_some());
        fate.finish = delta.finish;
        if fate.tokens.len() >= most {
            return;
        }
    }
}
