//! What a step's cost is made of, on a CPU and on a GPU.

use crate::profile::{Feature, Steps, Term};

/// Ranges are narrow where matrix products change their tiling and where keys and values outgrow a cache.
pub(super) fn cpu_terms() -> Vec<Term> {
    let tokens = ranges(&[0, 2, 4, 16, 64, 256, 1024]).map(|(from, to)| Feature::Tokens { from, to });
    let context = ranges(&[0, 1024, 2048, 4096]).map(|(from, to)| Feature::DecodeContext { from, to });
    let others = [
        Feature::Prefills { from: 0, to: None },
        Feature::PrefillPairs,
        Feature::Decodes { from: 0, to: None },
        Feature::Adapters,
        Feature::LoraTokens { from: 0, to: None },
        Feature::LoraTokenRanks,
    ];
    [Feature::Step].into_iter().chain(tokens).chain(context).chain(others).map(Term::from).collect()
}

/// Rows up to which a step with prefills has a cost of its own for every shape that it is rounded up to: products
/// are computed in tiles, so that their time goes in steps of 128 rows and of waves of tiles.
const EVERY_SHAPE: u64 = 1024;

/// Rates of recent prefill, in hundreds of tokens a second, that a cost may begin at: for models of all sizes.
const RECENT: [u64; 11] = [10, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12_800];

/// Steps of decodes alone are bound by what they read, and all of them are graphs; steps with prefills are graphs of
/// other shapes, or launched kernel by kernel where a small step's time hides behind: the two kinds share no term.
pub(super) fn gpu_terms() -> Vec<Term> {
    let of = |steps: Steps, features: Vec<Feature>| {
        features.into_iter().map(move |feature| Term { steps, feature }).collect::<Vec<_>>()
    };
    let context = |knots| ranges(knots).map(|(from, to)| Feature::DecodeContext { from, to });
    let rows = |knots| ranges(knots).map(|(from, to)| Feature::Rows { from, to });
    let lora = |knots| ranges(knots).map(|(from, to)| Feature::LoraTokens { from, to });
    let adapters =
        [Feature::Lora, Feature::Adapters, Feature::AdapterRanks, Feature::LoraTokenRanks].into_iter();
    let lora_rows = |knots| ranges(knots).map(|(from, to)| Feature::LoraRows { from, to });
    // A step is computed in one of a few shapes, and so are its adapters.
    let decode = rows(&[0, 2, 4, 8, 16, 24, 64])
        .chain(lora_rows(&[0, 2, 4, 8, 16, 32]))
        .chain(context(&[0, 512, 2048, 8192, 32_768]))
        .chain([Feature::Step, Feature::Decodes { from: 0, to: None }])
        .chain(adapters.clone())
        .chain(lora(&[0]))
        .collect();
    let shapes: Vec<u64> = [0, 16, 24]
        .into_iter()
        .chain((64..=EVERY_SHAPE).step_by(64))
        .chain([1280, 1536, 2048, 2560, 3072, 3584])
        .collect();
    let mixed = rows(&shapes)
        .chain(context(&[0]))
        .chain([
            Feature::Step,
            Feature::Decodes { from: 0, to: None },
            // A graph has room for none, up to 32 or all of them beside chunks, and for up to four chunks: steps of
            // more are launched kernel by kernel.
            Feature::Decodes { from: 0, to: Some(1) },
            Feature::Decodes { from: 32, to: Some(33) },
            Feature::Prefills { from: 0, to: None },
            Feature::Prefills { from: 4, to: Some(5) },
            Feature::PrefillSpan,
            Feature::PrefillPairs,
        ])
        .chain(adapters)
        // Segments of over 16 rows have kernels of their own, beside those of the decodes'.
        .chain(lora(&[0, 64]))
        .chain([Feature::LoraBoth])
        .chain(ranges(&RECENT).map(|(from, to)| Feature::HotRows { from, to }))
        .collect();
    [of(Steps::Decode, decode), of(Steps::Mixed, mixed)].concat()
}

/// Adjoining ranges; the last one has no end.
pub(super) fn ranges(knots: &[u64]) -> impl Iterator<Item = (u64, Option<u64>)> + '_ {
    knots.iter().enumerate().map(|(i, &from)| (from, knots.get(i + 1).copied()))
}
