use super::super::llama_like;
use super::*;

fn say(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

/// A tokenizer's folder with this in it.
fn with(files: &[(&str, &str)]) -> (tempfile::TempDir, Tokenizer) {
    let (folder, _) = llama_like();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let tokenizer = Tokenizer::resolve(folder.path().to_str()).unwrap();
    (folder, tokenizer)
}

fn config(template: &str) -> String {
    serde_json::json!({
        "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "chat_template": template,
    })
    .to_string()
}

/// What a template makes of messages.
fn rendered(template: &str, messages: &[Message]) -> Result<String, String> {
    let (folder, tokenizer) = with(&[("tokenizer_config.json", &config(template))]);
    let render = || ChatTemplate::of(&tokenizer)?.render(messages, true);
    render().map_err(|e| {
        let message = e.to_string();
        assert!(message.contains(folder.path().to_str().unwrap()), "no folder in: {message}");
        message
    })
}

/// Llama 2's, as its tokenizer_config.json has it.
const LLAMA_2: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

#[test]
fn a_models_template_renders_as_in_transformers() {
    let talk =
        [say("system", "Be brief."), say("user", " Hi "), say("assistant", "Hello."), say("user", "Bye")];
    assert_eq!(
        rendered(LLAMA_2, &talk).unwrap(),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello. </s><s>[INST] Bye [/INST]"
    );
    let refused = rendered(LLAMA_2, &[say("assistant", "I begin")]).unwrap_err();
    assert!(refused.contains("refuses these messages: Conversation roles must alternate"), "{refused}");
}

#[test]
fn blocks_are_trimmed_as_transformers_does() {
    let template = "{% for m in messages %}\n    {% if m.role == 'user' %}\nQ: {{ m.content }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nA:\n{% endif %}\n";
    assert_eq!(
        rendered(template, &[say("user", "one"), say("user", "two")]).unwrap(),
        "Q: one\nQ: two\nA:\n"
    );
}

#[test]
fn python_methods_json_time_and_loop_controls_are_there() {
    let one = [say("user", "It's <b>& \\u003c"), say("user", "never seen")];
    let template = "{% for m in messages %}{{ m.content.split(' ')[0].upper() }} {{ m | tojson }}{% break %}{% endfor %}";
    assert_eq!(rendered(template, &one).unwrap(), r#"IT'S {"role": "user", "content": "It's <b>& \\u003c"}"#);
    let year = rendered("{{ strftime_now('%Y') }}", &one).unwrap();
    assert!(year.len() == 4 && year.bytes().all(|b| b.is_ascii_digit()), "{year}");
    assert!(rendered("{{ strftime_now('%Q') }}", &one).unwrap_err().contains("cannot format"));
    assert!(rendered("{{ 1 | tojson(ensure_ascii=true) }}", &one).unwrap_err().contains("ensure_ascii"));
}

#[test]
fn errors_name_the_line() {
    let one = [say("user", "x")];
    let syntax = rendered("one\ntwo\n{% if %}", &one).unwrap_err();
    assert!(syntax.contains("line 3"), "{syntax}");
    let unknown = rendered("one\n{{ messages | no_such_filter }}", &one).unwrap_err();
    assert!(unknown.contains("line 2") && unknown.contains("no_such_filter"), "{unknown}");
    let render = rendered("one\n\n{{ messages[0].gone.deeper }}", &one).unwrap_err();
    assert!(render.contains("line 3"), "{render}");
}

#[test]
fn a_jinja_file_goes_before_the_config_and_a_list_gives_its_default() {
    let list = serde_json::json!({"chat_template": [
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"},
    ]});
    let (_folder, tokenizer) = with(&[("tokenizer_config.json", &list.to_string())]);
    assert_eq!(ChatTemplate::of(&tokenizer).unwrap().render(&[], false).unwrap(), "listed");
    let (_folder, tokenizer) =
        with(&[("tokenizer_config.json", &config("config")), ("chat_template.jinja", "file")]);
    let template = ChatTemplate::of(&tokenizer).unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "file");
    assert!(template.said().ends_with("chat_template.jinja"));
    for (text, said) in [
        (r#"{"chat_template": [{"name": "rag", "template": "x"}]}"#, "only rag"),
        (r#"{"chat_template": 7}"#, "neither a text nor a list"),
        ("{", "EOF"),
    ] {
        let (folder, tokenizer) = with(&[("tokenizer_config.json", text)]);
        let error = ChatTemplate::of(&tokenizer).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains(folder.path().to_str().unwrap()), "{error}");
    }
}

#[test]
fn without_a_template_there_is_a_plain_one() {
    let talk = [say("system", "Be brief."), say("user", "ab")];
    let (_folder, tokenizer) = with(&[]);
    for tokenizer in [tokenizer, Tokenizer::byte_level()] {
        let template = ChatTemplate::of(&tokenizer).unwrap();
        assert_eq!(template.render(&talk, true).unwrap(), "system: Be brief.\nuser: ab\nassistant:");
        assert_eq!(template.render(&talk, false).unwrap(), "system: Be brief.\nuser: ab\n");
        // One BOS, the tokenizer's.
        let ids = template.encode(&talk, true).unwrap();
        assert_eq!(ids.iter().filter(|id| Some(**id) == tokenizer.bos()).count(), 1);
        assert_eq!(ids[0], tokenizer.bos().unwrap());
    }
}

#[test]
fn a_templates_own_bos_is_the_only_one() {
    let (_folder, tokenizer) = with(&[("tokenizer_config.json", &config("{{ bos_token }}ab"))]);
    let ids = ChatTemplate::of(&tokenizer).unwrap().encode(&[], true).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 1).count(), 1, "{ids:?}");
}
