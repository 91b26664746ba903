//! From configuration to the things it names.

use std::fmt::Display;
use std::path::Path;

use candle_core::Device;

use super::{
    Adapter as Trained, AdapterArgs, Device as DeviceName, Dtype, MatmulPrecision, ModelArgs,
};
use crate::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig, load};
use crate::model::{Matrix, ModelConfig};
use crate::ops::{self, Engine, WeightDtype};
use crate::{Error, Result};

/// What the user should know where a key asks for a precision whose products this processor computes as those
/// of the highest.
pub(crate) fn precision_note(key: &str, precision: ops::MatmulPrecision) -> Option<String> {
    let same = precision == ops::MatmulPrecision::Medium && precision.is_highest_here();
    same.then(|| {
        format!(
            "{key} medium has its products in f32, as highest: this processor has nothing faster; keys, \
             values and results of attention are rounded to bf16"
        )
    })
}

impl ModelArgs {
    /// The engine of the named device. Tensors of one engine do not mix with those of another on the
    /// same GPU: a program makes one.
    ///
    /// # Errors
    /// If the program was built without that device, or the machine has none.
    pub fn engine(&self) -> Result<Engine> {
        let device = match self.device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda(_) if !cfg!(feature = "cuda") => {
                return Err(Error::usage(format!(
                    "device {} cannot be used: this program was built without CUDA; build it with \
                     --features cuda (docs/devices.md)",
                    self.device
                )));
            }
            DeviceName::Cuda(number) => Device::new_cuda(number).map_err(|error| {
                Error::usage(format!("device {} cannot be used here: {error}", self.device))
            })?,
        };
        let precision = self.matmul_precision.of_ops();
        let told = precision_note("matmul_precision", precision).filter(|_| device.is_cpu());
        told.iter().for_each(|text| crate::notice::note(text));
        Ok(Engine::new(device, precision))
    }

    /// The storage of the model's matrices; nothing for the checkpoint's own.
    pub fn storage(&self) -> Option<WeightDtype> {
        match self.dtype {
            Dtype::Auto => None,
            Dtype::F32 => Some(WeightDtype::F32),
            Dtype::Bf16 => Some(WeightDtype::Bf16),
        }
    }
}

impl MatmulPrecision {
    /// The engine's name of it.
    pub fn of_ops(self) -> ops::MatmulPrecision {
        match self {
            MatmulPrecision::Highest => ops::MatmulPrecision::Highest,
            MatmulPrecision::High => ops::MatmulPrecision::High,
            MatmulPrecision::Medium => ops::MatmulPrecision::Medium,
        }
    }
}

impl AdapterArgs {
    /// The adapters to train: fresh ones, or those of `adapter_name_or_path`.
    ///
    /// # Errors
    /// If a layer does not exist, or the saved adapter does not fit the model or is of another kind
    /// than `adapter` and `steering_kind`.
    pub fn build(
        &self,
        model: &ModelConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Vec<Box<dyn Adapter>>> {
        if let Some(folder) = &self.adapter_name_or_path {
            let adapters = load(folder, model, device)?;
            self.check_kinds(folder, &adapters)?;
            return Ok(adapters);
        }
        let mut adapters: Vec<Box<dyn Adapter>> = Vec::new();
        if matches!(self.adapter, Trained::Steering | Trained::Joint) {
            let config = self.steering_config(model)?;
            adapters.push(Box::new(Steering::new(config, model, seed, device)?));
        }
        if matches!(self.adapter, Trained::Lora | Trained::Joint) {
            adapters.push(Box::new(Lora::new(self.lora_config(), model, seed, device)?));
        }
        Ok(adapters)
    }

    /// Refuses a loaded adapter of another kind than the keys name, which set its learning rates.
    fn check_kinds(&self, folder: &Path, adapters: &[Box<dyn Adapter>]) -> Result<()> {
        let refuse = |key: &str, wanted: &dyn Display, found: &dyn Display| {
            let folder = folder.display();
            Err(Error::usage(format!(
                "{key} is {wanted}, but {folder} holds {found}; set {key} = \"{found}\""
            )))
        };
        let kind = adapters.iter().find_map(|adapter| adapter.steering_kind());
        let lora = adapters.iter().any(|adapter| adapter.group() == "lora");
        let found = match (kind, lora) {
            (Some(_), true) => Trained::Joint,
            (Some(_), false) => Trained::Steering,
            (None, _) => Trained::Lora,
        };
        if found != self.adapter {
            return refuse("adapter", &name(self.adapter), &name(found));
        }
        match kind.filter(|kind| *kind != self.steering_kind) {
            Some(kind) => refuse("steering_kind", &self.steering_kind, &kind),
            None => Ok(()),
        }
    }

    /// The steering adapter's configuration for a model.
    ///
    /// # Errors
    /// If a layer does not exist.
    pub fn steering_config(&self, model: &ModelConfig) -> Result<SteeringConfig> {
        Ok(SteeringConfig {
            kind: self.steering_kind,
            site: self.steering_site,
            rank: self.steering_rank,
            alpha: self.steering_alpha,
            layers: self.steering_layers.resolve(model.layers.len())?,
            positions: self.steering_positions,
        })
    }

    /// The LoRA's configuration.
    pub fn lora_config(&self) -> LoraConfig {
        let names = self.lora_target_modules.names();
        let chosen = |matrix: &Matrix| names.contains(&matrix.short_name());
        LoraConfig {
            r: self.lora_r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora,
            target_modules: Matrix::ALL.into_iter().filter(chosen).collect(),
        }
    }
}

/// The word that names what is trained.
fn name(adapter: Trained) -> &'static str {
    match adapter {
        Trained::Steering => "steering",
        Trained::Lora => "lora",
        Trained::Joint => "joint",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::testing::tiny_model;
    use crate::adapter::{BaseModel, SteeringKind, save};

    #[test]
    fn a_saved_adapter_must_be_of_the_kinds_that_the_keys_name() {
        let (model, device) = (tiny_model(), Device::Cpu);
        let vector = AdapterArgs { steering_kind: SteeringKind::Vector, ..Default::default() };
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &vector.build(&model, 0, &device).unwrap(), &BaseModel::default())
            .unwrap();
        let from = |args: AdapterArgs| {
            let args = AdapterArgs { adapter_name_or_path: Some(dir.path().into()), ..args };
            args.build(&model, 0, &device).map(|adapters| adapters.len())
        };
        assert_eq!(from(vector.clone()).unwrap(), 1);
        let error = from(AdapterArgs::default()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().ends_with("set steering_kind = \"vector\""), "{error}");
        for adapter in [Trained::Lora, Trained::Joint] {
            let error = from(AdapterArgs { adapter, ..vector.clone() }).unwrap_err().to_string();
            assert!(error.ends_with("set adapter = \"steering\""), "{error}");
        }
    }
}
