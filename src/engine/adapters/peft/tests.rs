use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::*;
use crate::engine::model::preset;

fn folder(config: &str, tensors: &[(&str, [usize; 2])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let tensors: HashMap<String, Tensor> = tensors
        .iter()
        .map(|(name, [rows, cols])| {
            let t = Tensor::arange(0f32, (rows * cols) as f32, &Device::Cpu).unwrap();
            ((*name).to_owned(), t.reshape((*rows, *cols)).unwrap())
        })
        .collect();
    candle_core::safetensors::save(&tensors, dir.path().join("adapter_model.safetensors")).unwrap();
    dir
}

const Q: &str = "base_model.model.model.layers.1.self_attn.q_proj";
const V: &str = "base_model.model.model.layers.2.self_attn.v_proj";

fn read(config: &str, tensors: &[(&str, [usize; 2])]) -> Result<(AdapterLayout, Vec<f32>), String> {
    let dir = folder(config, tensors);
    read_peft(&preset("tiny").unwrap(), 4, dir.path()).map_err(|e| {
        let message = e.to_string();
        assert!(message.contains(dir.path().to_str().unwrap()), "no folder in: {message}");
        message
    })
}

/// `q_proj` of layer 1 at rank 2.
fn pair(stem: &str, rank: usize, outputs: usize) -> [(String, [usize; 2]); 2] {
    [(format!("{stem}.lora_A.weight"), [rank, 256]), (format!("{stem}.lora_B.weight"), [outputs, rank])]
}

fn names(tensors: &[(String, [usize; 2])]) -> Vec<(&str, [usize; 2])> {
    tensors.iter().map(|(name, shape)| (name.as_str(), *shape)).collect()
}

#[test]
fn matrices_and_scale_are_read_and_b_is_transposed() {
    let tensors = pair(Q, 2, 128);
    let (layout, slab) = read(r#"{"r":2,"lora_alpha":8}"#, &names(&tensors)).unwrap();
    assert_eq!((layout.scale(), slab.len()), (4.0, 2 * 384));
    let part = layout.part(1, 0).unwrap();
    let (a, b) = layout.matrices(part, 0, &slab);
    assert_eq!((a[1], b[0], b[1], b[128]), (1.0, 0.0, 2.0, 1.0));
    let tensors = [("decoy", [1, 1])];
    assert!(read(r#"{"r":2,"lora_alpha":8}"#, &tensors).unwrap_err().contains("decoy"));
}

#[test]
fn names_with_and_without_prefix_and_infix_are_the_same() {
    let config = r#"{"r":2,"lora_alpha":8,"target_modules":["q_proj"],"layers_to_transform":1}"#;
    let plain = read(config, &names(&pair(Q, 2, 128))).unwrap();
    for name in ["model.layers.1.self_attn.q_proj", "base_model.model.layers.1.self_attn.q_proj"] {
        assert_eq!(read(config, &names(&pair(name, 2, 128))).unwrap(), plain, "{name}");
    }
    let live =
        [(format!("{Q}.lora_A.default.weight"), [2, 256]), (format!("{Q}.lora_B.default.weight"), [128, 2])];
    assert_eq!(read(config, &names(&live)).unwrap(), plain);
    let twice = [pair(Q, 2, 128), live].concat();
    assert!(read(config, &names(&twice)).unwrap_err().contains("another pair"));
    let other = [(format!("{Q}.lora_A.mine.weight"), [2, 256])];
    assert!(read(config, &names(&other)).unwrap_err().contains("not called default"));
}

#[test]
fn rank_stabilised_adapters_scale_by_the_root() {
    let config = r#"{"r":4,"lora_alpha":8,"use_rslora":true,"peft_type":"LORA","bias":"none"}"#;
    assert_eq!(read(config, &names(&pair(Q, 4, 128))).unwrap().0.scale(), 4.0);
}

#[test]
fn modules_of_other_ranks_and_alphas_are_filled_up_and_scaled() {
    // The first pattern that matches counts: "q_proj" never gets to "self_attn.*".
    let config = r#"{"r":4,"lora_alpha":8,"target_modules":".*layers\\.(1\\..*q_proj|2\\..*v_proj)",
        "rank_pattern":{"q_proj":2,"self_attn.*":3},"alpha_pattern":{"layers.1.self_attn.q_proj":12}}"#;
    let tensors = [pair(Q, 2, 128), pair(V, 3, 32)].concat();
    let (layout, slab) = read(config, &names(&tensors)).unwrap();
    assert_eq!((layout.rank(), layout.scale()), (3, 1.0));
    let (a, b) = layout.matrices(layout.part(1, 0).unwrap(), 0, &slab);
    assert_eq!((a.len(), b.len()), (3 * 256, 3 * 128));
    // Scale 12 / 2: B's row 1 is 2 and 3.
    assert_eq!((a[257], b[1], b[128 + 1]), (257.0, 12.0, 18.0));
    assert!(a[2 * 256..].iter().chain(&b[2 * 128..]).all(|v| *v == 0.0));
    let part = layout.part(2, 2).unwrap();
    let (_, b) = layout.matrices(part, 0, &slab);
    // Scale 8 / 3: B's row 1 is 3, 4 and 5.
    assert_eq!((b[1], b[2 * 32 + 1]), (3.0 * (8.0 / 3.0), 5.0 * (8.0 / 3.0)));
}

#[test]
fn target_modules_are_a_list_a_pattern_or_all() {
    let q = pair(Q, 2, 128);
    let config = |targets: &str| format!(r#"{{"r":2,"lora_alpha":8,"target_modules":{targets}}}"#);
    let pattern = r#""model\\.layers\\.1\\.(?!mlp).*q_proj""#;
    assert!(read(&config(pattern), &names(&q)).is_ok());
    for targets in [r#"["k_proj"]"#, r#"["proj"]"#, r#"".*layers\\.2.*""#] {
        let message = read(&config(targets), &names(&q)).unwrap_err();
        assert!(message.contains("does not name its module"), "{targets}: {message}");
    }
    // Modules that the configuration names and the file lacks.
    for targets in [r#"["q_proj"]"#, r#""all-linear""#] {
        let message = read(&config(targets), &names(&q)).unwrap_err();
        assert!(message.contains("layers.0.self_attn.q_proj") && message.contains("not whole"), "{message}");
    }
    let excluded =
        r#"{"r":2,"lora_alpha":8,"target_modules":["q_proj"],"exclude_modules":".*layers\\.[02].*"}"#;
    assert!(read(excluded, &names(&q)).is_ok());
    let message = read(&config(r#""(unclosed""#), &names(&q)).unwrap_err();
    assert!(message.contains("target_modules") && message.contains("no pattern"), "{message}");
}

#[test]
fn what_cannot_be_served_is_named() {
    let pair = pair(Q, 2, 128);
    for (fields, said) in [
        (r#""r":8,"lora_alpha":8"#, "rank 8"),
        (r#""r":0,"lora_alpha":8"#, "rank 0"),
        (r#""r":2,"lora_alpha":8,"rank_pattern":{"q_proj":5}"#, "rank 5"),
        (r#""r":2,"lora_alpha":8,"use_dora":true"#, "DoRA rescales"),
        (r#""r":2,"lora_alpha":8,"bias":"all""#, "bias"),
        (r#""r":2,"lora_alpha":8,"lora_bias":true"#, "lora_bias"),
        (r#""r":2,"lora_alpha":8,"modules_to_save":["lm_head"]"#, "modules_to_save"),
        (r#""r":2,"lora_alpha":8,"layers_pattern":"blocks""#, "layers_pattern"),
        (r#""r":2,"lora_alpha":8,"init_lora_weights":"pissa_niter_4""#, "pissa_niter_4"),
        (r#""r":2,"lora_alpha":8,"peft_type":"IA3""#, "IA3"),
        (r#""r":2"#, "lora_alpha"),
        (r#""r":2,"lora_alpha":8,"rank_pattern":[1]"#, "object of patterns"),
    ] {
        let message = read(&format!("{{{fields}}}"), &names(&pair)).unwrap_err();
        assert!(message.contains(said), "{fields}: {message}");
    }
    let good =
        r#"{"r":2,"lora_alpha":8,"rank_pattern":null,"layers_pattern":["layers"],"init_lora_weights":true}"#;
    assert!(read(good, &names(&pair)).is_ok());
    assert!(read(good, &names(&pair)[..1]).unwrap_err().contains("lora_B is missing"));
    let stray = self::pair("base_model.model.model.layers.9.self_attn.q_proj", 2, 128);
    let message = read(good, &names(&stray)).unwrap_err();
    assert!(message.contains("layers.9") && message.contains("3 layers"), "{message}");
    for (tensor, said) in [
        ("x.lora_C.weight", "lora_C"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.lm_head.modules_to_save.weight", "replace a module"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.bias", "biases"),
    ] {
        let message = read(good, &[(tensor, [1, 1])]).unwrap_err();
        assert!(message.contains(said), "{tensor}: {message}");
    }
    let head = self::pair("base_model.model.lm_head", 2, 128);
    assert!(read(good, &names(&head)).unwrap_err().contains("linear modules"));
}

#[test]
fn another_bases_shapes_are_refused_with_both() {
    let config = r#"{"r":2,"lora_alpha":8,"base_model_name_or_path":"other/base"}"#;
    let message = read(config, &names(&pair(Q, 2, 512))).unwrap_err();
    for said in ["[512, 2]", "[128, 2]", "tiny", "other/base", "lora_B"] {
        assert!(message.contains(said), "{said}: {message}");
    }
    // The configuration's rank is not the file's.
    let message = read(r#"{"r":3,"lora_alpha":8}"#, &names(&pair(Q, 2, 128))).unwrap_err();
    assert!(
        message.contains("[2, 256]") && message.contains("[3, 256]") && message.contains("rank 3"),
        "{message}"
    );
}
