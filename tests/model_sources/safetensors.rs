//! Safetensors folders: types, shards, prefixes, and damaged files.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use steersman::model::{GenerationConfig, ModelConfig, ModelSource, StoredDtype, Weights};

const PROBE: &str = "model.layers.0.self_attn.q_proj.weight";

/// Serialises tensors of one type.
fn file(dtype: Dtype, tensors: &[(&str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (*name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn folder(files: &[(&str, &[u8])]) -> (tempfile::TempDir, ModelSource) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let source = ModelSource::Folder(folder.path().to_path_buf());
    (folder, source)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn open_error(source: &ModelSource) -> String {
    match Weights::open(source) {
        Ok(_) => panic!("accepted {source:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn half_precision_becomes_f32_exactly_and_bf16_stays() {
    let numbers = [1.0f32, -0.333_251_95, 65_504.0, 5.960_464_5e-8];
    let halves: Vec<u8> = numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let (_keep, source) =
        folder(&[("model.safetensors", &file(Dtype::F16, &[(PROBE, &[2, 2], halves)]))]);
    let weights = Weights::open(&source).unwrap();
    let tensor = weights.get(PROBE, &[2, 2]).unwrap();
    assert_eq!((weights.dtype(), tensor.dtype()), (StoredDtype::F16, DType::F32));
    assert_eq!(values(&tensor), numbers);
    let brains: Vec<u8> = numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let (_keep, source) =
        folder(&[("model.safetensors", &file(Dtype::BF16, &[(PROBE, &[2, 2], brains)]))]);
    let weights = Weights::open(&source).unwrap();
    let tensor = weights.get(PROBE, &[2, 2]).unwrap();
    assert_eq!((weights.dtype(), tensor.dtype()), (StoredDtype::Bf16, DType::BF16));
    assert_eq!(values(&tensor)[0], 1.0);
}

#[test]
fn shards_are_found_through_their_index_and_a_missing_one_is_named() {
    let index = format!(
        r#"{{"weight_map": {{"{PROBE}": "model-00001-of-00002.safetensors",
            "model.norm.weight": "model-00002-of-00002.safetensors"}}}}"#
    );
    let first = file(Dtype::F32, &[(PROBE, &[1, 2], floats(&[1.0, 2.0]))]);
    let second = file(Dtype::F32, &[("model.norm.weight", &[2], floats(&[3.0, 4.0]))]);
    let (keep, source) = folder(&[
        ("model.safetensors.index.json", index.as_bytes()),
        ("model-00001-of-00002.safetensors", &first),
        ("model-00002-of-00002.safetensors", &second),
    ]);
    let path = keep.path().to_str().unwrap();
    assert_eq!(ModelSource::resolve(path).unwrap(), source);
    let weights = Weights::open(&source).unwrap();
    assert_eq!(values(&weights.get("model.norm.weight", &[2]).unwrap()), [3.0, 4.0]);
    assert_eq!(values(&weights.get(PROBE, &[1, 2]).unwrap()), [1.0, 2.0]);
    std::fs::remove_file(keep.path().join("model-00002-of-00002.safetensors")).unwrap();
    let error = ModelSource::resolve(path).unwrap_err().to_string();
    assert!(error.contains("has no model-00002-of-00002.safetensors"), "{error}");
}

#[test]
fn an_index_cannot_point_outside_its_folder() {
    let index = r#"{"weight_map": {"a": "../secret.safetensors"}}"#;
    let (_keep, source) = folder(&[("model.safetensors.index.json", index.as_bytes())]);
    assert!(open_error(&source).contains("not a file name"));
}

#[test]
fn text_weights_of_multimodal_checkpoints_are_found_under_both_prefixes() {
    for prefix in ["language_model.model.", "model.language_model.", ""] {
        let name = PROBE.replacen("model.", prefix, 1);
        let bytes = file(Dtype::F32, &[(&name, &[1, 1], floats(&[7.0]))]);
        let (_keep, source) = folder(&[("model.safetensors", &bytes)]);
        let weights = Weights::open(&source).unwrap();
        assert_eq!(values(&weights.get(PROBE, &[1, 1]).unwrap()), [7.0], "{prefix}");
    }
}

#[test]
fn a_missing_tensor_and_a_wrong_shape_name_tensor_file_and_shapes() {
    let bytes = file(Dtype::F32, &[(PROBE, &[1, 2], floats(&[1.0, 2.0]))]);
    let (keep, source) = folder(&[("model.safetensors", &bytes)]);
    let weights = Weights::open(&source).unwrap();
    let folder = keep.path().display();
    assert_eq!(
        weights.get(PROBE, &[2, 2]).unwrap_err().to_string(),
        format!("tensor '{PROBE}' of {folder} has shape [1, 2], the configuration expects [2, 2]")
    );
    assert_eq!(
        weights.get("lm_head.weight", &[2]).unwrap_err().to_string(),
        format!("{folder} has no tensor 'lm_head.weight'")
    );
}

#[test]
fn damaged_files_are_one_sentence_naming_the_file() {
    let whole = file(Dtype::F32, &[(PROBE, &[1, 2], floats(&[1.0, 2.0]))]);
    let mut beyond = whole.clone();
    let digits = beyond.windows(4).position(|bytes| bytes == b"[0,8").unwrap();
    beyond[digits + 3] = b'9';
    let mut header = whole.clone();
    header[0] = 0xff;
    header[5] = 0xff;
    for bytes in [&whole[..whole.len() - 1], &whole[..20], &whole[..3], &[], &beyond, &header] {
        let (_keep, source) = folder(&[("model.safetensors", bytes)]);
        let error = open_error(&source);
        assert!(error.contains("model.safetensors is truncated or no safetensors"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let integers = file(Dtype::I32, &[(PROBE, &[1, 1], vec![0; 4])]);
    let (_keep, source) = folder(&[("model.safetensors", &integers)]);
    assert!(open_error(&source).contains("type I32; supported are F32, F16 and BF16"));
}

#[test]
fn a_name_that_leads_nowhere_says_what_is_accepted() {
    let (keep, _) = folder(&[]);
    let at = |name: &str| ModelSource::resolve(name).unwrap_err();
    let error = at(keep.path().to_str().unwrap()).to_string();
    assert!(error.contains("has no model.safetensors or model.safetensors.index.json"), "{error}");
    let config = keep.path().join("config.json");
    assert!(at(config.to_str().unwrap()).to_string().contains("is a file but no .gguf file"));
    std::fs::remove_file(&config).unwrap();
    let error = at(keep.path().to_str().unwrap()).to_string();
    assert!(error.ends_with("has no config.json"), "{error}");
    let error = at("smollm2-135m");
    assert!(error.to_string().contains("did you mean 'smollm2-135m-instruct'?"), "{error}");
    assert_eq!(error.exit_code(), 2);
    assert!(at("./no/such/folder").to_string().contains("give a folder with config.json"));
    assert!(at("owner/file.gguf").to_string().contains("not found"));
}

#[test]
fn one_or_several_end_ids_come_from_either_file() {
    let read = |generation: &str, config: &str| {
        let parse = |text: &str| serde_json::from_str(text).unwrap();
        GenerationConfig::from_json(&parse(generation), &parse(config))
    };
    let several = read(r#"{"eos_token_id": [1, 106], "top_k": 64}"#, r#"{"eos_token_id": 2}"#);
    let several = several.unwrap();
    assert_eq!((several.eos_token_ids, several.top_k), (vec![1, 106], Some(64)));
    assert_eq!(read("{}", r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
    assert!(read("null", r#"{"eos_token_id": null}"#).unwrap().eos_token_ids.is_empty());
    let text = r#"{"text_config": {"eos_token_id": 9, "bos_token_id": 3}}"#;
    let text = read("{}", text).unwrap();
    assert_eq!((text.eos_token_ids, text.bos_token_id), (vec![9], Some(3)));
    assert!(read("{}", r#"{"eos_token_id": "two"}"#).unwrap_err().to_string().contains("two"));
}

/// Reads every tensor of a model that its configuration asks for.
fn read_everything(folder: PathBuf) {
    let source = ModelSource::resolve(folder.to_str().unwrap()).unwrap();
    let config = ModelConfig::load(&source).unwrap();
    let weights = Weights::open(&source).unwrap();
    let mut count = 0;
    let mut get = |name: &str, shape: &[usize]| {
        let tensor = weights.get(name, shape).unwrap_or_else(|error| panic!("{error}"));
        count += tensor.elem_count();
    };
    let (vocab, hidden, head) = (config.vocab_size, config.hidden_size, config.head_dim);
    get("model.embed_tokens.weight", &[vocab, hidden]);
    get("model.norm.weight", &[hidden]);
    if !config.tie_word_embeddings {
        get("lm_head.weight", &[vocab, hidden]);
    }
    for i in 0..config.layers.len() {
        let name = |module: &str| format!("model.layers.{i}.{module}");
        for matrix in steersman::model::Matrix::ALL {
            let (input, output) = config.linear_shape(matrix);
            get(&name(&format!("{}.weight", matrix.module())), &[output, input]);
            if config.has_bias(matrix) {
                get(&name(&format!("{}.bias", matrix.module())), &[output]);
            }
        }
        get(&name("input_layernorm.weight"), &[hidden]);
        get(&name("post_attention_layernorm.weight"), &[hidden]);
        if config.sandwich_norms {
            get(&name("pre_feedforward_layernorm.weight"), &[hidden]);
            get(&name("post_feedforward_layernorm.weight"), &[hidden]);
        }
        if config.qk_norm {
            get(&name("self_attn.q_norm.weight"), &[head]);
            get(&name("self_attn.k_norm.weight"), &[head]);
        }
    }
    assert_eq!(count, config.parameters(), "{}", folder.display());
}

#[test]
fn every_reference_checkpoint_has_exactly_the_tensors_of_its_configuration() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    for name in [
        "fixtures/gemma3",
        "fixtures/llama-tied",
        "fixtures/llama3-scaled-rope",
        "fixtures/qwen2",
        "fixtures/qwen3",
        "models/stories260k",
    ] {
        match shared.join(name) {
            folder if folder.exists() => read_everything(folder),
            folder => eprintln!("skipped: {} is missing", folder.display()),
        }
    }
}
