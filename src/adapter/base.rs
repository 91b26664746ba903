//! Which model an adapter was trained on.

use std::path::Path;

use serde::Deserialize;

use super::folder::{self, LORA_CONFIG, STEERING_CONFIG};
use crate::Result;
use crate::model::BaseModel;

/// What the configurations of all adapters say of their model.
#[derive(Deserialize)]
struct Stated {
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    #[serde(default)]
    base_model_sha256: Option<String>,
}

/// Prints a warning on standard error for every adapter folder whose model had other weights than
/// `model`, which is computed only if an adapter states the hash of its model.
///
/// # Errors
/// If a configuration is damaged or `model` fails.
pub fn warn_of_other_model(
    folders: &[impl AsRef<Path>],
    model: impl FnOnce() -> Result<BaseModel>,
) -> Result<()> {
    for warning in warnings(folders, model)? {
        crate::notice::warn(&warning);
    }
    Ok(())
}

fn warnings(
    folders: &[impl AsRef<Path>],
    model: impl FnOnce() -> Result<BaseModel>,
) -> Result<Vec<String>> {
    let mut stated = Vec::new();
    for folder in folders {
        for name in [STEERING_CONFIG, LORA_CONFIG] {
            let path = folder.as_ref().join(name);
            if !path.is_file() {
                continue;
            }
            let found: Stated = folder::read_json(&path)?;
            stated.extend(found.base_model_sha256.map(|hash| {
                let name = found.base_model_name_or_path.unwrap_or_default();
                (path, BaseModel { name_or_path: name, sha256: Some(hash) })
            }));
        }
    }
    if stated.is_empty() {
        return Ok(Vec::new());
    }
    let model = model()?;
    let others = stated.iter().filter(|(_, base)| base.sha256 != model.sha256);
    let sentence = |(path, base): &(std::path::PathBuf, BaseModel)| {
        format!(
            "{}: the adapter was trained on {}, but the model {} has other weights",
            path.display(),
            named(base),
            named(&model)
        )
    };
    Ok(others.map(sentence).collect())
}

/// `name (sha256 0123456789ab)`.
fn named(base: &BaseModel) -> String {
    let hash: String = base.sha256.iter().flat_map(|hash| hash.chars()).take(12).collect();
    format!("{} (sha256 {hash})", base.name_or_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(hash: &str) -> BaseModel {
        BaseModel { name_or_path: "mine".to_string(), sha256: Some(hash.to_string()) }
    }

    #[test]
    fn only_an_adapter_of_other_weights_is_warned_of() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"base_model_name_or_path": "theirs", "base_model_sha256": "aa11"}"#;
        std::fs::write(dir.path().join(LORA_CONFIG), text).unwrap();
        let found = warnings(&[dir.path()], || Ok(model("bb22"))).unwrap();
        assert_eq!(found.len(), 1);
        for part in [LORA_CONFIG, "theirs (sha256 aa11)", "mine (sha256 bb22)"] {
            assert!(found[0].contains(part), "{found:?}");
        }
        assert!(warnings(&[dir.path()], || Ok(model("aa11"))).unwrap().is_empty());
    }

    #[test]
    fn the_model_is_not_hashed_for_adapters_without_a_hash() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(STEERING_CONFIG), "{}").unwrap();
        let unwanted = || Err(crate::Error::failure("hashed"));
        assert!(warnings(&[dir.path()], unwanted).unwrap().is_empty());
    }
}
