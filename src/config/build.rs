//! From configuration to the things it names.

use candle_core::Device;

use super::{
    Adapter as Trained, AdapterArgs, Device as DeviceName, Dtype, MatmulPrecision, ModelArgs,
};
use crate::adapter::{Adapter, Lora, LoraConfig, Steering, SteeringConfig, load};
use crate::model::{Matrix, ModelConfig};
use crate::ops::{self, Engine, WeightDtype};
use crate::{Error, Result};

impl ModelArgs {
    /// The engine of the named device.
    ///
    /// # Errors
    /// If the program was built without that device, or the machine has none.
    pub fn engine(&self) -> Result<Engine> {
        let device = match self.device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => Device::new_cuda(0)
                .map_err(|e| Error::usage(format!("device cuda cannot be used here: {e}")))?,
        };
        let precision = match self.matmul_precision {
            MatmulPrecision::Highest => ops::MatmulPrecision::Highest,
            MatmulPrecision::High => ops::MatmulPrecision::High,
            MatmulPrecision::Medium => ops::MatmulPrecision::Medium,
        };
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

impl AdapterArgs {
    /// The adapters to train: fresh ones, or those of `adapter_name_or_path`.
    ///
    /// # Errors
    /// If a layer does not exist, or the saved adapter does not fit the model.
    pub fn build(
        &self,
        model: &ModelConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Vec<Box<dyn Adapter>>> {
        if let Some(folder) = &self.adapter_name_or_path {
            return load(folder, model, device);
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
