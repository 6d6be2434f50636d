"""Makes what a client needs without a hub: a tokenizer folder, or a random model with PEFT adapters.

    python make_model.py tokenizer DIR
    python make_model.py model DIR [--adapters 4] [--rank 8] [--layers 12] [--hidden 768]

The tokenizer is byte-level: one token a byte of UTF-8, a begin mark before the text. The model has OPT's
architecture (opt-125m's size by default) and weights drawn from a seed; its adapters lie in DIR/lora-0 ….
`tokenizer` needs the packages transformers and tokenizers, `model` torch and peft too.
"""

import argparse
import pathlib


def make_tokenizer(folder):
    """Byte-level tokens 0…255 of GPT-2's byte alphabet, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    for special in ("<s>", "</s>", "<pad>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: ",
    )
    fast.save_pretrained(folder)
    return fast


def make_model(folder, adapters, rank, layers, hidden):
    """A random OPT and `adapters` random adapters of its attention."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        ffn_dim=4 * hidden,
        num_attention_heads=max(1, hidden // 64),
        word_embed_proj_dim=hidden,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OPTForCausalLM(config)
    model.save_pretrained(folder)
    for number in range(adapters):
        torch.manual_seed(1 + number)
        of_lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, of_lora)
        for name, parameter in adapted.named_parameters():
            # PEFT starts B at zero: an adapter that changes nothing would hide a wrong one.
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder / f"lora-{number}")
        model = adapted.unload()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokenizer", "model"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "tokenizer":
        make_tokenizer(args.folder)
    else:
        make_model(args.folder, args.adapters, args.rank, args.layers, args.hidden)


if __name__ == "__main__":
    main()
