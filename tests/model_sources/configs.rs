//! `config.json` of every family against what transformers makes of it (`make_configs.py`).

use proptest::prelude::*;
use serde_json::{Value, json};
use steersman::model::{Matrix, ModelConfig};

fn cases() -> Vec<Value> {
    serde_json::from_str(include_str!("configs.json")).unwrap()
}

fn parse(config: &Value) -> ModelConfig {
    ModelConfig::from_json(config).unwrap_or_else(|error| panic!("{config}: {error}"))
}

/// Distance of two positive floats in units of the last place.
fn ulps(a: f32, bits: &Value) -> u32 {
    a.to_bits().abs_diff(bits.as_u64().unwrap() as u32)
}

#[test]
fn switches_and_sizes_are_those_of_transformers() {
    for case in cases() {
        let (name, reference) = (&case["name"], &case["reference"]);
        let config = parse(&case["config"]);
        assert_eq!(json!(config.parameters()), reference["parameters"], "{name}");
        assert_eq!(json!(config.head_dim), reference["head_dim"], "{name}");
        assert_eq!(json!(config.attention_bias), reference["attention_bias"], "{name}");
        assert_eq!(json!(config.o_bias), reference["o_bias"], "{name}");
        assert_eq!(json!(config.mlp_bias), reference["mlp_bias"], "{name}");
        assert_eq!(json!(config.tie_word_embeddings), reference["tied"], "{name}");
        assert_eq!(json!(config.rms_norm_eps), reference["eps"], "{name}");
        assert_eq!(json!(config.embedding_scale), reference["embedding_scale"], "{name}");
        let scale = reference["attention_scale"].as_f64().unwrap();
        assert!((config.attention_scale - scale).abs() < 1e-15, "{name}");
    }
}

#[test]
fn windows_and_frequencies_of_every_layer_are_those_of_transformers() {
    for case in cases() {
        let name = &case["name"];
        let config = parse(&case["config"]);
        let layers = case["reference"]["layers"].as_array().unwrap();
        assert_eq!(config.layers.len(), layers.len(), "{name}");
        for (layer, reference) in config.layers.iter().zip(layers) {
            assert_eq!(json!(layer.window), reference["window"], "{name}");
            let rope = &config.ropes[layer.rope];
            let factor = reference["attention_factor"].as_f64().unwrap();
            assert!((f64::from(rope.attention_factor()) - factor).abs() < 1e-7, "{name}");
            let bits = reference["inv_freq"].as_array().unwrap();
            let frequencies = rope.inv_freq();
            assert_eq!(frequencies.len(), bits.len(), "{name}");
            for (i, (frequency, bits)) in frequencies.iter().zip(bits).enumerate() {
                assert!(ulps(*frequency, bits) <= 2, "{name}: frequency {i} is {frequency}");
            }
        }
    }
}

fn model(family: &str, sizes: [usize; 8]) -> ModelConfig {
    let [layers, hidden, inner, heads, kv, head_dim, vocab, tied] = sizes;
    parse(&json!({
        "model_type": family, "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": head_dim, "vocab_size": vocab, "tie_word_embeddings": tied == 1,
    }))
}

fn llama_1b() -> ModelConfig {
    model("llama", [16, 2048, 8192, 32, 8, 64, 128_256, 1])
}

fn qwen_4b() -> ModelConfig {
    model("qwen3", [36, 2560, 9728, 32, 8, 128, 151_936, 1])
}

/// Released sizes, as their model cards and `num_parameters()` give them.
#[test]
fn whole_models_have_their_published_number_of_parameters() {
    let gemma = model("gemma3_text", [26, 1152, 6912, 4, 1, 256, 262_144, 1]);
    let llama_8b = model("llama", [32, 4096, 14_336, 32, 8, 128, 128_256, 0]);
    let smol = model("llama", [30, 576, 1536, 9, 3, 64, 49_152, 1]);
    assert_eq!(llama_1b().parameters(), 1_235_814_400);
    assert_eq!(gemma.parameters(), 999_885_952);
    assert_eq!(qwen_4b().parameters(), 4_022_468_096);
    assert_eq!(llama_8b.parameters(), 8_030_261_248);
    assert_eq!(smol.parameters(), 134_515_008);
}

#[test]
fn adapters_have_the_number_of_parameters_of_the_paper() {
    let linear = |config: &ModelConfig| config.layers.len() * 2 * config.hidden_size * 8;
    let lora = |config: &ModelConfig| {
        let sides = Matrix::ALL.map(|matrix| config.linear_shape(matrix));
        config.layers.len() * 8 * sides.iter().map(|(input, output)| input + output).sum::<usize>()
    };
    assert_eq!(linear(&llama_1b()), 524_288);
    assert_eq!(linear(&model("gemma3_text", [26, 1152, 6912, 4, 1, 256, 262_144, 1])), 479_232);
    assert_eq!(linear(&qwen_4b()), 1_474_560);
    assert_eq!(linear(&model("llama", [32, 4096, 14_336, 32, 8, 128, 128_256, 0])), 2_097_152);
    assert_eq!(linear(&model("llama", [30, 576, 1536, 9, 3, 64, 49_152, 1])), 276_480);
    assert_eq!(lora(&llama_1b()), 5_636_096);
}

#[test]
fn the_text_part_of_a_multimodal_gemma_is_read() {
    let text = json!({"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34,
        "intermediate_size": 10240, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}});
    let config = parse(&json!({"model_type": "gemma3", "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model"}}));
    assert_eq!((config.num_attention_heads, config.head_dim, config.layers.len()), (8, 256, 34));
    assert_eq!((config.layers[4].window, config.layers[5].window), (Some(1024), None));
    assert!(config.tie_word_embeddings && config.norm_plus_one);
    assert_eq!(config.ropes[0].inv_freq()[0], 0.125);
    assert_eq!(config.ropes[1].inv_freq()[0], 1.0);
}

fn refused(config: Value) -> String {
    match ModelConfig::from_json(&config) {
        Ok(_) => panic!("accepted {config}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{error}");
            error.to_string()
        }
    }
}

/// A small Llama with some keys set.
fn llama(extra: Value) -> Value {
    let mut config = json!({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,
        "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 40});
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let families = "llama, mistral, qwen2, qwen3, gemma3_text, gemma3";
    assert_eq!(
        refused(json!({"model_type": "mamba"})),
        format!("model_type 'mamba' is not supported; supported are {families}")
    );
    for (extra, word) in [
        (json!({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}), "longrope"),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "dynamic"),
        (json!({"rope_scaling": {"rope_type": "linear"}}), "'factor'"),
        (json!({"rope_scaling": {"mrope_section": [1, 2]}}), "mrope_section"),
        (json!({"rope_theta": 0}), "'rope_theta' must be positive"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"num_local_experts": 8}), "num_local_experts"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"hidden_act": "relu2"}), "relu2"),
        (json!({"hidden_size": "big"}), "'hidden_size' must be a whole number"),
        (json!({"hidden_size": 32.5}), "'hidden_size' must be a whole number"),
        (json!({"num_key_value_heads": 3}), "multiple"),
        (json!({"num_key_value_heads": 0}), "'num_key_value_heads' must be at least 1"),
        (json!({"num_attention_heads": 0}), "at least 1"),
        (json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers"),
        (json!({"head_dim": 7}), "even"),
        (json!({"sliding_window": 8}), "sliding_window"),
        (json!({"layer_types": ["full_attention"]}), "1 entries for 2 layers"),
        (json!({"layer_types": ["full_attention", "chunked_attention"]}), "chunked_attention"),
        (
            json!({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0}),
            "at least 1",
        ),
        (json!({"model_type": "gemma3_text", "use_bidirectional_attention": true}), "bidirect"),
        (json!({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}), "per layer"),
    ] {
        let message = refused(llama(extra));
        assert!(message.contains(word), "{message} lacks {word}");
    }
    assert!(refused(json!([])).contains("object"));
    assert!(refused(json!({"hidden_size": 2})).contains("'model_type' is missing"));
}

/// Values of every kind, some of them sensible.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0i64..64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
        Just(json!([])),
        Just(json!(["full_attention", "sliding_attention"])),
        Just(json!({"rope_type": "yarn", "factor": -1})),
        Just(json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0.1})),
        Just(json!({"full_attention": {"rope_type": "llama3"}})),
    ]
}

proptest! {
    #[test]
    fn odd_values_are_refused_or_give_a_usable_configuration(
        changes in proptest::collection::vec((0usize..64, any_value()), 1..4),
        case in 0usize..64,
    ) {
        let cases = cases();
        let mut config = cases[case % cases.len()]["config"].clone();
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        let more = ["rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim"];
        let keys: Vec<&str> = keys.iter().map(String::as_str).chain(more).collect();
        for (at, value) in changes {
            config[keys[at % keys.len()]] = value;
        }
        if let Ok(config) = ModelConfig::from_json(&config) {
            prop_assert!(config.parameters() > 0);
            prop_assert!(config.layers.iter().all(|layer| layer.rope < config.ropes.len()));
        }
    }
}
