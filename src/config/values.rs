//! The keys whose value is more than a number or a word: layers, positions, modules, columns,
//! resume. Each is written the same way in a flag and in TOML and prints as it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::suggest::did_you_mean;

/// A TOML value that may be a text, a number, a boolean or a list of these.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Words {
    Text(String),
    Number(i64),
    Flag(bool),
    List(Vec<Words>),
}

impl Words {
    /// The same value as a flag would spell it.
    pub(super) fn spell(&self) -> String {
        match self {
            Words::Text(text) => text.clone(),
            Words::Number(number) => number.to_string(),
            Words::Flag(flag) => flag.to_string(),
            Words::List(items) => items.iter().map(Words::spell).collect::<Vec<_>>().join(","),
        }
    }
}

/// Gives a type with `FromStr` and `Display` the matching serde form.
macro_rules! serde_as_text {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                Words::deserialize(from)?.spell().parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

pub(super) use serde_as_text;

serde_as_text!(Layers, TargetModules, Resume);

/// Which blocks are steered, counted from 0: `all`, or numbers and ranges such as `0-3,7`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Layers {
    /// Every block.
    #[default]
    All,
    /// These blocks.
    Some(BTreeSet<usize>),
}

/// Highest block number that can be named; far above any known model.
const MAX_LAYER: usize = 4095;

impl Layers {
    /// The block numbers in a model of `num_layers` blocks, in order. An error names the block
    /// that the model does not have.
    pub fn resolve(&self, num_layers: usize) -> crate::Result<Vec<usize>> {
        match self {
            Layers::All => Ok((0..num_layers).collect()),
            Layers::Some(layers) => match layers.iter().find(|layer| **layer >= num_layers) {
                Some(layer) => Err(crate::Error::usage(format!(
                    "steering_layers names layer {layer}, but the model's layers are 0 to {}",
                    num_layers.saturating_sub(1)
                ))),
                None => Ok(layers.iter().copied().collect()),
            },
        }
    }
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "all" {
            return Ok(Layers::All);
        }
        let mut layers = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let bounds = first.trim().parse::<usize>().ok().zip(last.trim().parse::<usize>().ok());
            match bounds {
                Some((first, last)) if first <= last && last <= MAX_LAYER => {
                    layers.extend(first..=last)
                }
                _ => return Err("expects all, or layers such as 0-3,7".to_string()),
            }
        }
        Ok(Layers::Some(layers))
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layers::Some(layers) = self else { return f.write_str("all") };
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for &layer in layers {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == layer => *last = layer,
                _ => ranges.push((layer, layer)),
            }
        }
        let spell = |(first, last): &(usize, usize)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        };
        f.write_str(&ranges.iter().map(spell).collect::<Vec<_>>().join(","))
    }
}

/// The seven matrices of a block that LoRA can adapt, by their name in the checkpoint.
pub const LORA_MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which matrices LoRA adapts: `all-linear`, or names such as `q_proj,v_proj`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum TargetModules {
    /// All seven matrices of every block.
    #[default]
    AllLinear,
    /// These, a subset of [`LORA_MODULES`].
    Some(BTreeSet<String>),
}

impl TargetModules {
    /// The names, in the order of [`LORA_MODULES`].
    pub fn names(&self) -> Vec<&'static str> {
        let chosen = |name: &&str| match self {
            TargetModules::AllLinear => true,
            TargetModules::Some(names) => names.contains(*name),
        };
        LORA_MODULES.into_iter().filter(chosen).collect()
    }
}

impl FromStr for TargetModules {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if matches!(text.trim(), "all-linear" | "all_linear") {
            return Ok(TargetModules::AllLinear);
        }
        let names: BTreeSet<String> = text.split(',').map(|name| name.trim().to_string()).collect();
        match names.iter().find(|name| !LORA_MODULES.contains(&name.as_str())) {
            Some(name) => Err(format!(
                "expects all-linear, or some of {}, not \"{name}\"{}",
                LORA_MODULES.join(","),
                did_you_mean(name, LORA_MODULES)
            )),
            None => Ok(TargetModules::Some(names)),
        }
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetModules::AllLinear => f.write_str("all-linear"),
            TargetModules::Some(_) => f.write_str(&self.names().join(",")),
        }
    }
}

/// Renamed data columns, our name to the file's: `columns = {prompt = "question"}` in TOML,
/// `--columns prompt=question,completion=answer` as a flag.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Columns(pub BTreeMap<String, String>);

impl FromStr for Columns {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || "expects pairs such as prompt=question,completion=answer".to_string();
        let mut columns = BTreeMap::new();
        for pair in text.split(',').filter(|pair| !pair.trim().is_empty()) {
            let (ours, theirs) = pair.split_once('=').ok_or_else(error)?;
            let (ours, theirs) = (ours.trim(), theirs.trim());
            if ours.is_empty() || theirs.is_empty() {
                return Err(error());
            }
            if columns.insert(ours.to_string(), theirs.to_string()).is_some() {
                return Err(format!("names the column {ours} twice"));
            }
        }
        Ok(Columns(columns))
    }
}

/// A flag that may be given several times, or with several values behind it; a text or a list of
/// texts in TOML.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Texts")]
pub struct Repeated(pub Vec<String>);

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expects a text or a list of texts")]
enum Texts {
    One(String),
    Several(Vec<String>),
}

impl From<Texts> for Repeated {
    fn from(texts: Texts) -> Self {
        Repeated(match texts {
            Texts::One(text) => vec![text],
            Texts::Several(texts) => texts,
        })
    }
}

impl Repeated {
    /// Stands between values that one flag takes.
    pub const SEPARATOR: char = '\u{1f}';
}

impl FromStr for Repeated {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Repeated(text.split(Repeated::SEPARATOR).map(str::to_string).collect()))
    }
}

/// Numbers: `1,0.5` as a flag, a number or a list of numbers in TOML.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(from = "NumberOrList")]
pub struct Numbers(pub Vec<f64>);

/// One number or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expects a number or a list of numbers")]
enum NumberOrList {
    One(f64),
    Several(Vec<f64>),
}

impl From<NumberOrList> for Numbers {
    fn from(numbers: NumberOrList) -> Self {
        Numbers(match numbers {
            NumberOrList::One(number) => vec![number],
            NumberOrList::Several(numbers) => numbers,
        })
    }
}

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split(',').map(|part| part.trim().parse::<f64>());
        let numbers = numbers.collect::<Result<Vec<_>, _>>();
        Ok(Numbers(numbers.map_err(|_| "expects numbers such as 1,0.5".to_string())?))
    }
}

/// Whether the run continues an earlier one: `false`, `true` or `latest`, or a checkpoint's path.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Resume {
    /// A new run.
    #[default]
    No,
    /// From the newest undamaged checkpoint of `output_dir`, or from the start if there is none.
    Latest,
    /// From this checkpoint folder, which must lie in `output_dir`.
    From(PathBuf),
}

impl FromStr for Resume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("expects true, false, latest or the path of a checkpoint".to_string()),
            "false" | "False" => Ok(Resume::No),
            "true" | "True" | "latest" => Ok(Resume::Latest),
            path => Ok(Resume::From(PathBuf::from(path))),
        }
    }
}

impl fmt::Display for Resume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Resume::No => f.write_str("false"),
            Resume::Latest => f.write_str("latest"),
            Resume::From(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layers_are_numbers_and_ranges() {
        let layers: Layers = "7,0-3, 2".parse().unwrap();
        assert_eq!(layers.to_string(), "0-3,7");
        assert_eq!(layers.resolve(8).unwrap(), [0, 1, 2, 3, 7]);
        assert_eq!("all".parse::<Layers>().unwrap().resolve(3).unwrap(), [0, 1, 2]);
        let error = layers.resolve(7).unwrap_err().to_string();
        assert_eq!(error, "steering_layers names layer 7, but the model's layers are 0 to 6");
        for bad in ["", "3-1", "a", "1,,2", "-1", "0-99999999999"] {
            assert!(bad.parse::<Layers>().is_err(), "{bad}");
        }
    }

    #[test]
    fn modules_are_known_names_in_a_fixed_order() {
        let modules: TargetModules = "v_proj,q_proj".parse().unwrap();
        assert_eq!(modules.names(), ["q_proj", "v_proj"]);
        assert_eq!(TargetModules::AllLinear.names(), LORA_MODULES);
        let error = "q_porj".parse::<TargetModules>().unwrap_err();
        assert!(error.ends_with("not \"q_porj\"; did you mean q_proj?"), "{error}");
    }

    #[test]
    fn columns_are_pairs() {
        let columns: Columns = "prompt=question, completion=answer".parse().unwrap();
        assert_eq!(columns.0["completion"], "answer");
        assert_eq!("".parse(), Ok(Columns::default()));
        for bad in ["prompt", "=x", "prompt=", "a=b,a=c"] {
            assert!(bad.parse::<Columns>().is_err(), "{bad}");
        }
    }

    #[test]
    fn toml_takes_lists_numbers_and_booleans() {
        #[derive(Deserialize)]
        struct Keys {
            layers: Layers,
            one: Layers,
            modules: TargetModules,
            resume: Resume,
            text: Repeated,
            texts: Repeated,
        }
        let text = "layers = [4, 5, \"8-9\"]\none = 3\nmodules = [\"o_proj\"]\nresume = true\n\
                    text = \"a,b\"\ntexts = [\"a\", \"b\"]";
        let keys: Keys = toml::from_str(text).unwrap();
        assert_eq!(keys.layers.to_string(), "4-5,8-9");
        assert_eq!(keys.one.to_string(), "3");
        assert_eq!(keys.modules.names(), ["o_proj"]);
        assert_eq!(keys.resume, Resume::Latest);
        assert_eq!((keys.text.0, keys.texts.0.len()), (vec!["a,b".to_string()], 2));
    }

    proptest! {
        #[test]
        fn layers_print_as_they_are_read(layers in prop::collection::btree_set(0..99usize, 1..9)) {
            let layers = Layers::Some(layers);
            prop_assert_eq!(layers.to_string().parse::<Layers>(), Ok(layers));
        }

        #[test]
        fn no_text_panics(text in ".{0,20}") {
            let _ = text.parse::<Layers>().is_ok();
            let _ = text.parse::<Columns>().is_ok();
            let _ = text.parse::<TargetModules>().is_ok();
        }
    }
}
