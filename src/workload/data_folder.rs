//! Where `fetch-data` puts what it fetches, and where everything else looks for it.

use std::path::PathBuf;

/// Names of hub repositories that hold the Llama-2 tokenizer; all of them mean the fetched one.
pub const LLAMA2_TOKENIZER_NAMES: &[&str] = &[
    "hf-internal-testing/llama-tokenizer",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-7b",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-13b-chat-hf",
    "NousResearch/Llama-2-7b-hf",
    "NousResearch/Llama-2-7b-chat-hf",
    "NousResearch/Llama-2-13b-hf",
];

/// The data folder: `$LORA_HBM_DATA`, else `$XDG_DATA_HOME/lora-hbm`, else `~/.local/share/lora-hbm`.
/// It need not exist.
pub fn data_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("LORA_HBM_DATA") {
        return folder;
    }
    if let Some(folder) = set("XDG_DATA_HOME") {
        return folder.join("lora-hbm");
    }
    set("HOME").unwrap_or_else(std::env::temp_dir).join(".local/share/lora-hbm")
}

/// The fetched Llama-2 tokenizer's `tokenizer.json`; it need not exist.
pub fn llama2_tokenizer_file() -> PathBuf {
    data_folder().join("llama-2-tokenizer").join("tokenizer.json")
}

/// The fetched ShareGPT text; it need not exist.
pub fn sharegpt_file() -> PathBuf {
    data_folder().join("ShareGPT_V3_unfiltered_cleaned_split.json")
}
