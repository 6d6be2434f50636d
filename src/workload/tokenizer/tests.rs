use super::*;

#[test]
fn byte_level_round_trips_and_counts_bytes_and_bos() {
    let t = Tokenizer::byte_level();
    let ids = t.encode("añ🦙").unwrap();
    assert_eq!(ids[0], 1);
    assert_eq!(ids.len(), 1 + 1 + 2 + 4);
    assert_eq!(ids[1], 3 + u32::from(b'a'));
    assert_eq!(t.decode(&ids), "añ🦙");
    assert_eq!(t.vocab_size(), 259);
    assert_eq!((t.bos(), t.eos()), (Some(1), Some(2)));
}

#[test]
fn byte_level_printable_ids_are_visible_ascii() {
    let t = Tokenizer::byte_level();
    let mask = t.printable(300);
    assert_eq!(mask.len(), 300);
    assert_eq!(mask.iter().filter(|&&p| p).count(), 0x7e - 0x20);
    assert!(mask[3 + usize::from(b'~')]);
    for id in [0, 1, 2, 3 + 0x20, 3 + 0x7f, 3 + 0xc3, 258, 259, 299] {
        assert!(!mask[id], "{id}");
    }
    assert_eq!(t.printable(4), vec![false; 4]);
}

#[test]
fn a_tokenizer_json_is_used_whole() {
    let (_folder, t) = llama_like();
    assert_eq!((t.vocab_size(), t.bos(), t.eos()), (265, Some(1), Some(2)));
    // Not cut at the four tokens of the file's own truncation.
    let text = "ab ab ab ab ab ab 🦙";
    let ids = t.encode(text).unwrap();
    assert_eq!(ids[0], 1);
    assert!(ids.len() > 8);
    assert_eq!(t.decode(&ids), text);
}

#[test]
fn a_stream_gives_the_same_text_as_decoding_at_once() {
    let (_folder, hf) = llama_like();
    for t in [hf, Tokenizer::byte_level()] {
        for text in ["ab a b", "a🦙b ñ ab", "🦙🦙", " ab"] {
            let ids = t.encode(text).unwrap();
            let mut stream = t.decode_stream();
            let mut streamed = String::new();
            for &id in &ids {
                let piece = stream.push(id).unwrap_or_default();
                assert!(!piece.contains('\u{fffd}'));
                streamed += &piece;
            }
            streamed += &stream.finish().unwrap_or_default();
            assert_eq!(streamed, t.decode(&ids));
        }
    }
}

#[test]
fn a_continuation_keeps_the_space_of_its_first_word() {
    let (_folder, t) = llama_like();
    let prompt = t.encode("ab").unwrap();
    let word = t.encode("ab").unwrap()[1];
    assert_eq!(t.decode_stream().push(word).unwrap(), "ab");
    assert_eq!(t.decode_stream_after(&prompt).push(word).unwrap(), " ab");
}

#[test]
fn incomplete_characters_are_held_back_and_never_for_good() {
    let (_folder, hf) = llama_like();
    for t in [hf, Tokenizer::byte_level()] {
        let lead = 3 + 0xF0;
        let mut stream = t.decode_stream();
        assert_eq!(stream.push(lead), None);
        assert_eq!(stream.finish().as_deref(), Some("\u{fffd}"));
        // A model that never completes a character still gets its text out, at linear cost.
        let mut stream = t.decode_stream();
        let out: String = (0..10_000).filter_map(|_| stream.push(lead)).collect();
        assert!(out.chars().count() > 9_000, "{}", out.chars().count());
    }
}

#[test]
fn printable_ids_of_a_file_leave_out_bytes_that_are_no_character() {
    let (_folder, t) = llama_like();
    let mask = t.printable(300);
    assert!(mask[3 + usize::from(b'A')] && mask[264]);
    for id in [0, 1, 2, 3, 3 + 0xE2, 259, 265, 299] {
        assert!(!mask[id], "{id}");
    }
}
