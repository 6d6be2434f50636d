use super::*;

/// A profile with round costs: a step is 1 ms and 20 µs a token, a swap is 1 ms.
pub(crate) fn round() -> Profile {
    Profile {
        schema_version: SCHEMA_VERSION,
        kind: Kind::Engine,
        created: "2026-01-01T00:00:00Z".to_owned(),
        tool: "test".to_owned(),
        machine: serde_json::Value::Null,
        model: "tiny".to_owned(),
        adapter: AdapterCosts { ranks: vec![8, 16], bytes: vec![1_000_000, 2_000_000] },
        engine: EngineFacts {
            device: "cpu".to_owned(),
            dtype: "f32".to_owned(),
            threads: 1,
            layers: 4,
            block_size: 16,
            kv_block_bytes: 1 << 14,
            weights_bytes: 1 << 24,
            workspace_bytes: 1 << 24,
            memory_bytes: None,
            kv_memory_bytes: Some(1 << 30),
            max_model_len: 4352,
            max_num_batched_tokens: 4096,
            max_num_seqs: 16,
        },
        step: StepCosts {
            features: vec!["step".to_owned(), "tokens:0-".to_owned()],
            coef_ns: vec![1e6, 2e4],
        },
        swap: SwapCosts {
            fixed_s: 0.0,
            bytes_per_s: 1e9,
            busy_bytes_per_s: 1e9,
            step_slowdown: 0.0,
            reading_s: 0.0,
        },
        host: HostCosts {
            loop_s: 0.0,
            front_s: 0.0,
            tokenize_s_per_byte: 0.0,
            handover_s: 0.0,
            handover_bytes: 0.0,
            deliver_s: 0.0,
            bytes_per_token: 4.0,
        },
        residuals: Quantiles::default(),
        holdout: Holdout::default(),
        samples_file: None,
        sha256: String::new(),
    }
    .signed()
}

fn refuse(change: impl Fn(&mut Profile)) -> String {
    let mut profile = round();
    change(&mut profile);
    let text = serde_json::to_string(&profile.signed()).unwrap();
    Profile::parse("p.json", &text).unwrap_err().to_string()
}

#[test]
fn round_trips() {
    let text = serde_json::to_string_pretty(&round()).unwrap();
    assert_eq!(Profile::parse("p.json", &text).unwrap(), round());
}

#[test]
fn bad_profiles_are_refused_with_the_reason() {
    assert!(refuse(|p| p.schema_version = 7).contains("schema version 7"));
    assert!(refuse(|p| p.step.coef_ns[1] = -3.0).contains("'tokens:0-' is -3"));
    assert!(refuse(|p| p.step.features[0] = "luck".to_owned()).contains("'luck'"));
    assert!(refuse(|p| p.swap.bytes_per_s = 0.0).contains("bytes_per_s is 0"));
    assert!(refuse(|p| _ = p.step.coef_ns.pop()).contains("as many as features"));

    let text = serde_json::to_string(&round()).unwrap();
    let edited = text.replace("20000.0", "10000.0");
    assert!(Profile::parse("p.json", &edited).unwrap_err().to_string().contains("changed after"));
    let missing = text.replace("\"swap\"", "\"swop\"");
    assert!(Profile::parse("p.json", &missing).unwrap_err().to_string().contains("swop"));
    assert!(round().expect_model("facebook/opt-125m").is_err());
}

#[test]
fn a_profile_from_before_there_were_costs_of_reading_and_handing_over_keeps_its_hash() {
    let before = serde_json::to_string(&round()).unwrap();
    assert!(!before.contains("reading_s") && !before.contains("handover"));
    assert_eq!(Profile::parse("before.json", &before).unwrap().swap.reading_s, 0.0);
    let mut profile = round();
    profile.swap.reading_s = 2e-4;
    let profile = profile.signed();
    let text = serde_json::to_string(&profile).unwrap();
    assert_eq!(Profile::parse("p.json", &text).unwrap(), profile);
    let edited = text.replace("\"reading_s\":0.0002", "\"reading_s\":0.0001");
    assert!(Profile::parse("p.json", &edited).unwrap_err().to_string().contains("changed after"));
}

#[test]
fn a_prompt_that_is_handed_over_takes_longer_at_once() {
    let mut profile = round();
    profile.host = HostCosts {
        front_s: 1e-4,
        tokenize_s_per_byte: 1e-8,
        handover_s: 8e-5,
        handover_bytes: 960.0,
        ..profile.host
    };
    let cost = CostModel::new(&profile.signed()).unwrap();
    assert_eq!([1, 239, 240, 1000].map(|tokens| cost.front_ns(tokens)), [100_040, 109_560, 189_600, 220_000]);
}

#[test]
fn ranks_between_calibrated_ones_are_interpolated_and_others_refused() {
    let profile = round();
    assert_eq!(profile.adapter_bytes(8).unwrap(), 1_000_000);
    assert_eq!(profile.adapter_bytes(12).unwrap(), 1_500_000);
    assert!(profile.adapter_bytes(4).is_err());
    assert!(profile.adapter_bytes(32).is_err());
}

#[test]
fn slots_take_memory_from_the_kv_cache_where_they_share_it() {
    let mut profile = round();
    profile.engine.memory_bytes = Some((1 << 25) + 10_000_000 + 300 * (1 << 14));
    profile.engine.kv_memory_bytes = None;
    assert_eq!(profile.kv_blocks(10, 8, 16, 4352, None).unwrap(), 300);
    let error = profile.kv_blocks(11, 8, 16, 4352, None).unwrap_err();
    assert!(error.to_string().contains("lower --gpu-loras"), "{error}");
    // A cache of a given size, as long as there is room for it.
    assert_eq!(profile.kv_blocks(10, 8, 16, 4352, Some(280 << 14)).unwrap(), 280);
    assert!(profile.kv_blocks(10, 8, 16, 4352, Some(301 << 14)).is_err());
}

#[test]
fn what_does_not_fit_names_the_flag_that_is_at_fault() {
    let mut shared = round();
    shared.engine.memory_bytes = Some((1 << 25) + 10_000_000 + 300 * (1 << 14));
    shared.engine.kv_memory_bytes = None;
    let refused = |profile: &Profile, slots, model_len, kv_memory| {
        profile.kv_blocks(slots, 8, 16, model_len, kv_memory).unwrap_err()
    };
    // Ten slots and 300 blocks fit; a request of 4,352 tokens takes 272 blocks.
    for (slots, model_len, kv_blocks, says, of_the_budget) in [
        (11, 4352, None, "11 slots leave no room for one request: required 49.01 MB", true),
        (10, 4352, Some(301), "lower --gpu-loras or --kv-memory", true),
        (1, 4352, Some(271), "raise --kv-memory, or lower --max-model-len", false),
        (
            10,
            4352,
            Some(1 << 40),
            "weights and one slot leave 13.92 MB of 48.47 MB: lower --kv-memory",
            false,
        ),
        (10, 1_000_000, None, "of KV cache and there is room for 13.92 MB: lower --max-model-len", false),
    ] {
        let error = refused(&shared, slots, model_len, kv_blocks.map(|n: u64| n << 14));
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(error.is_of_the_budget(), of_the_budget, "{error}");
        assert!(of_the_budget || !error.to_string().contains("--gpu-loras"), "{error}");
    }
    // A cache with a memory of its own does not care for slots.
    let own = refused(&round(), 2, 2_000_000, None).to_string();
    assert!(own.contains("there is room for 1.07 GB: lower --max-model-len"), "{own}");
    let small = refused(&round(), 2, 4352, Some(1024)).to_string();
    assert!(small.starts_with("--kv-memory 1.02 kB holds no request of 4352 tokens"), "{small}");
}
