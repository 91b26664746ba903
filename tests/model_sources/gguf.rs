//! GGUF against llama.cpp's own Python package (`make_gguf.py`), and damaged files.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use steersman::model::{
    Family, GenerationConfig, Gguf, ModelConfig, ModelSource, RopeScaling, StoredDtype, Weights,
};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model_sources/tiny.gguf")
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_type_is_read_as_llama_cpp_reads_it() {
    let gguf = Gguf::open(&tiny()).unwrap();
    for kind in
        ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
    {
        let found = gguf.read(&format!("t.{kind}")).unwrap();
        let expected = values(&gguf.read(&format!("expect.{kind}")).unwrap());
        let bf16 = kind == "BF16";
        assert_eq!(found.dtype(), if bf16 { DType::BF16 } else { DType::F32 }, "{kind}");
        assert_eq!(found.dims(), [2, 256], "{kind}");
        for (i, (found, expected)) in values(&found).iter().zip(&expected).enumerate() {
            let distance = found.to_bits().abs_diff(expected.to_bits());
            assert!(distance <= 1, "{kind}[{i}]: {found} instead of {expected}");
        }
    }
}

#[test]
fn rows_of_q_and_k_are_in_hugging_face_order_and_others_as_stored() {
    let gguf = Gguf::open(&tiny()).unwrap();
    let weights = Weights::open(&ModelSource::Gguf(tiny())).unwrap();
    for (hf, stored, shape) in [
        ("q_proj.weight", "expect.blk.0.attn_q.weight", vec![16, 16]),
        ("k_proj.weight", "expect.blk.0.attn_k.weight", vec![8, 16]),
        ("q_proj.bias", "expect.blk.0.attn_q.bias", vec![16]),
        ("k_proj.bias", "expect.blk.0.attn_k.bias", vec![8]),
        ("v_proj.weight", "blk.0.attn_v.weight", vec![8, 16]),
        ("o_proj.weight", "blk.0.attn_output.weight", vec![16, 16]),
    ] {
        let found = weights.get(&format!("model.layers.0.self_attn.{hf}"), &shape).unwrap();
        assert_eq!(values(&found), values(&gguf.read(stored).unwrap()), "{hf}");
    }
    assert_eq!(weights.dtype(), StoredDtype::F32);
    assert!(weights.contains("model.norm.weight") && !weights.contains("lm_head.weight"));
}

#[test]
fn the_configuration_comes_from_metadata_and_tensors() {
    let config = ModelConfig::load(&ModelSource::Gguf(tiny())).unwrap();
    assert_eq!(config.family, Family::Llama);
    assert_eq!((config.vocab_size, config.hidden_size, config.layers.len()), (10, 16, 1));
    assert_eq!(
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        (2, 1, 8)
    );
    assert_eq!((config.intermediate_size, config.max_position_embeddings), (24, 64));
    assert_eq!(config.rms_norm_eps as f32, 1e-5);
    assert!(config.tie_word_embeddings && config.attention_bias && !config.o_bias);
    assert_eq!(config.ropes[0].scaling, RopeScaling::Divisors(vec![1.0, 1.0, 4.0, 8.0]));
    let plain = |i: i32| 500_000f64.powf(-f64::from(i) / 4.0);
    let last = f64::from(config.ropes[0].inv_freq()[3]);
    assert!((last / (plain(3) / 8.0) - 1.0).abs() < 1e-6);
    let generation = GenerationConfig::load(&ModelSource::Gguf(tiny())).unwrap();
    assert_eq!((generation.eos_token_ids, generation.bos_token_id), (vec![2, 5], Some(1)));
}

/// Writes a file of some metadata and zeros of one embedding.
fn write(path: &Path, metadata: &[(&str, Value)]) {
    let zeros = Tensor::zeros((4, 32), DType::F32, &Device::Cpu).unwrap();
    let embedding = QTensor::quantize(&zeros, GgmlDType::F32).unwrap();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &[("token_embd.weight", &embedding)]).unwrap();
}

fn gemma(extra: Vec<(&'static str, Value)>) -> ModelConfig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gemma.gguf");
    let mut metadata = vec![
        ("general.architecture", Value::String("gemma3".into())),
        ("gemma3.block_count", Value::U32(7)),
        ("gemma3.context_length", Value::U32(128)),
        ("gemma3.embedding_length", Value::U32(32)),
        ("gemma3.feed_forward_length", Value::U32(64)),
        ("gemma3.attention.head_count", Value::U32(4)),
        ("gemma3.attention.head_count_kv", Value::U32(1)),
        ("gemma3.attention.key_length", Value::U32(16)),
        ("gemma3.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("gemma3.attention.sliding_window", Value::U32(512)),
    ];
    metadata.extend(extra);
    write(&path, &metadata);
    ModelConfig::load(&ModelSource::Gguf(path)).unwrap()
}

#[test]
fn gemma_has_a_global_layer_in_six_and_a_rope_for_each_kind() {
    let config = gemma(vec![
        ("gemma3.rope.scaling.type", Value::String("linear".into())),
        ("gemma3.rope.scaling.factor", Value::F32(8.0)),
    ]);
    let windows: Vec<_> = config.layers.iter().map(|layer| layer.window).collect();
    let local = Some(512);
    assert_eq!(windows, [local, local, local, local, local, None, local]);
    assert_eq!((config.layers[5].rope, config.layers[6].rope), (0, 1));
    assert_eq!((config.ropes[0].theta, config.ropes[1].theta), (1e6, 1e4));
    assert_eq!(config.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(config.ropes[1].scaling, RopeScaling::Default);
    assert!(config.sandwich_norms && config.qk_norm && !config.norm_plus_one);
    assert_eq!((config.attention_scale, config.head_dim), (0.25, 16));
}

#[test]
fn the_27b_gemma_scales_by_hidden_size_over_heads() {
    let config = gemma(vec![("gemma3.block_count", Value::U32(62))]);
    assert_eq!(config.attention_scale, 8f64.powf(-0.5));
}

#[test]
fn another_architecture_is_refused_with_the_list_of_served_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&path, &[("general.architecture", Value::String("mamba".into()))]);
    let error = ModelConfig::load(&ModelSource::Gguf(path)).unwrap_err();
    assert!(error.to_string().contains("'mamba' is not supported"), "{error}");
    assert!(error.to_string().contains("llama, qwen2, qwen3, gemma3"), "{error}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn a_file_cut_anywhere_is_one_sentence_naming_it() {
    let whole = std::fs::read(tiny()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    for length in [0, 3, 20, 200, 900, whole.len() / 2, whole.len() - 300] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = match Weights::open(&ModelSource::Gguf(path.clone())) {
            Ok(_) => panic!("accepted {length} bytes"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("cut.gguf") && !error.contains('\n'), "{length}: {error}");
    }
}

#[test]
fn a_row_that_ends_within_a_block_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("uneven.gguf");
    let zeros = Tensor::zeros((3, 32), DType::F32, &Device::Cpu).unwrap();
    let blocks = QTensor::quantize(&zeros, GgmlDType::Q4_1).unwrap();
    let mut bytes = std::io::Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &[], &[("output_norm.weight", &blocks)]).unwrap();
    let mut bytes = bytes.into_inner();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(Gguf::open(&path).unwrap().shape("output_norm.weight"), Some(&[3, 32][..]));
    let dims = |dims: [u64; 2]| dims.map(u64::to_le_bytes).concat();
    let at = bytes.windows(16).position(|window| window == dims([32, 3])).unwrap();
    bytes[at..at + 16].copy_from_slice(&dims([48, 2]));
    std::fs::write(&path, &bytes).unwrap();
    let error = Gguf::open(&path).err().unwrap().to_string();
    assert!(error.contains("uneven.gguf is truncated or damaged: tensor 'output_norm"), "{error}");
}

#[test]
fn a_wrong_byte_in_the_header_is_an_error_or_harmless_but_no_panic() {
    let mut bytes = std::fs::read(tiny()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bent.gguf");
    for at in (0..2000).step_by(7) {
        let kept = bytes[at];
        bytes[at] = kept.wrapping_add(101);
        std::fs::write(&path, &bytes).unwrap();
        bytes[at] = kept;
        let source = ModelSource::Gguf(path.clone());
        let _ = ModelConfig::load(&source);
        if let Ok(weights) = Weights::open(&source) {
            let _ = weights.get("model.layers.0.self_attn.q_proj.weight", &[16, 16]);
        }
    }
}
