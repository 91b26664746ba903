//! Models and data sets from the Hugging Face hub, kept in the cache that all its tools share.
//!
//! `HF_ENDPOINT` is the server, `HF_HOME` (or `HF_HUB_CACHE`) the cache, `HF_TOKEN` (or the file
//! `token` in `HF_HOME`) the access token, and `HF_HUB_OFFLINE` forbids every request. The client
//! `hf-hub` knows of the cache and the download; the rest of these is done here.

use std::cell::Cell;
use std::env;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::error::{Error, Result};
use crate::model::transfer::Transfer;
use crate::model::weights_safetensors::{INDEX, SINGLE, shard_files};

/// Files of a model that may be missing.
const OPTIONAL: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// What a hub id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A model: configuration, tokenizer and safetensors are fetched.
    Model,
    /// A model without its weights.
    ModelConfig,
    /// A data set: every file that can be read (JSON, JSON lines, parquet) is fetched.
    Dataset,
}

/// The hub and its cache, as the environment describes them.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The server, without a slash at its end.
    pub endpoint: String,
    /// Folder of `models--owner--name` folders.
    pub cache: PathBuf,
    /// Sent with every request if given.
    pub token: Option<String>,
    /// Only the cache is used.
    pub offline: bool,
}

impl Hub {
    /// Reads the `HF_…` variables.
    ///
    /// # Errors
    /// Usage: neither a cache folder nor a home folder is known.
    pub fn from_env() -> Result<Hub> {
        Self::from_vars(|name| env::var(name).ok())
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Hub> {
        let var = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let home = match (var("HF_HOME"), var("XDG_CACHE_HOME"), var("HOME")) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(cache), _) => Path::new(&cache).join("huggingface"),
            (None, None, Some(home)) => Path::new(&home).join(".cache/huggingface"),
            _ => return Err(Error::usage("no home folder is known; set HF_HOME")),
        };
        let token_file = || std::fs::read_to_string(home.join("token")).ok();
        let token = var("HF_TOKEN").or_else(token_file).map(|token| token.trim().to_string());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let offline = var("HF_HUB_OFFLINE").map(|value| value.to_uppercase());
        Ok(Hub {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.filter(|token| !token.is_empty()),
            offline: offline.is_some_and(|v| matches!(v.as_str(), "1" | "ON" | "YES" | "TRUE")),
        })
    }

    /// The folder of a repository's files. What the cache holds completely is used without asking
    /// the server.
    ///
    /// # Errors
    /// Usage: no such repository, or no access to it. Failure: the download failed, or the cache
    /// does not hold it and `HF_HUB_OFFLINE` is set.
    pub fn fetch(&self, kind: RepoKind, id: &str) -> Result<PathBuf> {
        let repo = Repo::new(id.to_string(), kind.repo_type());
        let cached = Cache::new(self.cache.clone()).repo(repo.clone());
        if kind == RepoKind::Model
            && let Some(folder) = cached_model(&cached)?
        {
            return Ok(folder);
        }
        if kind == RepoKind::ModelConfig
            && let Some(config) = cached.get("config.json")
        {
            return Ok(parent(&config));
        }
        if self.offline {
            return self.offline_folder(kind, id, &cached);
        }
        let api = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .build()
            .map_err(|error| self.explain(id, "files", &error))?;
        let download = Download { hub: self, id, api: api.repo(repo), cached };
        match kind {
            RepoKind::Model => download.model(true),
            RepoKind::ModelConfig => download.model(false),
            RepoKind::Dataset => download.dataset(),
        }
    }

    /// What the cache has; of a data set that may be a part, which only the server could tell.
    fn offline_folder(&self, kind: RepoKind, id: &str, cached: &CacheRepo) -> Result<PathBuf> {
        let folder = if kind == RepoKind::Dataset { cached_dataset(cached) } else { None };
        folder.ok_or_else(|| {
            let cache = self.cache.display();
            Error::failure(format!("HF_HUB_OFFLINE is set and {id} is not in the cache {cache}"))
        })
    }

    /// One sentence for a failed request.
    fn explain(&self, id: &str, file: &str, error: &ApiError) -> Error {
        let endpoint = &self.endpoint;
        match status(error) {
            Some(401 | 403) => Error::usage(format!(
                "{endpoint} gives no access to {id}: it does not exist or needs a token; set \
                 HF_TOKEN"
            )),
            Some(404) => Error::usage(format!("{endpoint} has no {file} of {id}")),
            _ => Error::failure(format!("cannot download {file} of {id} from {endpoint}: {error}")),
        }
    }
}

impl RepoKind {
    fn repo_type(self) -> RepoType {
        match self {
            RepoKind::Model | RepoKind::ModelConfig => RepoType::Model,
            RepoKind::Dataset => RepoType::Dataset,
        }
    }
}

/// Fetches a data set by its hub id, as [`Hub::fetch`] with the environment's hub.
///
/// # Errors
/// As [`Hub::fetch`].
pub fn fetch_dataset(id: &str) -> Result<PathBuf> {
    Hub::from_env()?.fetch(RepoKind::Dataset, id)
}

/// One repository being downloaded.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a str,
    api: ApiRepo,
    cached: CacheRepo,
}

impl Download<'_> {
    /// The weights come last: a cache that has them has everything.
    fn model(&self, weights: bool) -> Result<PathBuf> {
        let mut paths = vec![self.file("config.json")?];
        for name in OPTIONAL {
            paths.extend(self.optional(name)?);
        }
        if weights {
            paths.extend(self.weights()?);
        }
        let folder = parent(&paths[0]);
        if paths.iter().any(|path| parent(path) != folder) {
            return Err(Error::failure(format!(
                "{} changed on the hub while it was downloaded; run again",
                self.id
            )));
        }
        Ok(folder)
    }

    fn weights(&self) -> Result<Vec<PathBuf>> {
        if let Some(path) = self.optional(SINGLE)? {
            return Ok(vec![path]);
        }
        let index = self.optional(INDEX)?.ok_or_else(|| self.no_weights())?;
        let shards = shard_files(&index)?;
        let shards = shards.iter().map(|shard| self.file(shard)).collect::<Result<Vec<_>>>()?;
        Ok(shards.into_iter().chain([index]).collect())
    }

    fn no_weights(&self) -> Error {
        Error::usage(format!(
            "{} of {} has neither {SINGLE} nor {INDEX}",
            self.id, self.hub.endpoint
        ))
    }

    fn dataset(&self) -> Result<PathBuf> {
        let info = self.api.info().map_err(|error| self.hub.explain(self.id, "files", &error))?;
        let folder = self.cached.pointer_path(&info.sha);
        let files: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let data: Vec<&str> = files.into_iter().filter(|name| is_data(name)).collect();
        if data.is_empty() {
            return Err(Error::usage(format!(
                "the data set {} has no JSON, JSON lines or parquet files",
                self.id
            )));
        }
        for name in data {
            if !folder.join(name).exists() {
                self.download(name).map_err(|error| self.hub.explain(self.id, name, &error))?;
            }
        }
        Ok(folder)
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let got = self.cached.get(name).map_or_else(|| self.download(name), Ok);
        got.map_err(|error| self.hub.explain(self.id, name, &error))
    }

    /// Nothing if the repository does not have the file.
    fn optional(&self, name: &str) -> Result<Option<PathBuf>> {
        match self.cached.get(name).map_or_else(|| self.download(name), Ok) {
            Ok(path) => Ok(Some(path)),
            Err(error) if status(&error) == Some(404) => Ok(None),
            Err(error) => Err(self.hub.explain(self.id, name, &error)),
        }
    }

    /// Downloads one file and checks that all of it arrived.
    fn download(&self, name: &str) -> std::result::Result<PathBuf, ApiError> {
        let expected = Rc::new(Cell::new(0));
        let bar = Bar { expected: expected.clone(), transfer: None, done: 0 };
        let path = self.api.download_with_progress(name, bar)?;
        if std::fs::metadata(&path)?.len() != expected.get() {
            std::fs::remove_file(std::fs::canonicalize(&path)?)?;
            std::fs::remove_file(&path)?;
            return Err(ApiError::InvalidResume);
        }
        Ok(path)
    }
}

/// Shows hf-hub's progress as a [`Transfer`] and keeps the size that the server announced.
struct Bar {
    expected: Rc<Cell<u64>>,
    transfer: Option<Transfer>,
    done: u64,
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.expected.set(size as u64);
        self.done = 0;
        self.transfer.get_or_insert_with(|| Transfer::new(filename, size as u64));
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        if let Some(transfer) = &mut self.transfer {
            transfer.set(self.done);
        }
    }

    fn finish(&mut self) {
        if let Some(transfer) = &mut self.transfer {
            transfer.finish();
        }
    }
}

/// The snapshot of a model that is in the cache with all its weights.
fn cached_model(cached: &CacheRepo) -> Result<Option<PathBuf>> {
    let Some(config) = cached.get("config.json") else {
        return Ok(None);
    };
    let folder = parent(&config);
    if folder.join(SINGLE).exists() {
        return Ok(Some(folder));
    }
    let index = folder.join(INDEX);
    let complete =
        index.exists() && shard_files(&index)?.iter().all(|name| folder.join(name).exists());
    Ok(complete.then_some(folder))
}

/// The snapshot that `refs/main` of a data set names.
fn cached_dataset(cached: &CacheRepo) -> Option<PathBuf> {
    // an empty file name leads to the snapshot itself
    cached.get("")
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap_or(path).to_path_buf()
}

/// Whether a file of a data set holds rows, and its path stays inside the data set.
fn is_data(name: &str) -> bool {
    let path = Path::new(name);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    let extension = path.extension().and_then(|extension| extension.to_str());
    inside && matches!(extension, Some("json" | "jsonl" | "parquet"))
}

/// The HTTP status of a refused request. The client's error type belongs to a crate of its own,
/// so its text is read.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(source) => {
            source.to_string().strip_prefix("http status: ")?.parse().ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Result<Hub> {
        let find = |name: &str| vars.iter().find(|(key, _)| *key == name);
        Hub::from_vars(|name| find(name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn the_environment_decides_server_cache_token_and_offline() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let hf_home = home.path().to_str().unwrap();
        let plain = hub(&[("HOME", "/home/user")]).unwrap();
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/home/user/.cache/huggingface/hub"));
        assert_eq!((plain.token, plain.offline), (None, false));
        let set = [("HF_HOME", hf_home), ("HF_ENDPOINT", "http://h/"), ("HF_HUB_OFFLINE", "1")];
        let full = hub(&set).unwrap();
        assert_eq!((full.endpoint.as_str(), full.offline), ("http://h", true));
        assert_eq!(full.cache, home.path().join("hub"));
        assert_eq!(full.token.as_deref(), Some("hf_file"));
        let token = hub(&[("HF_HOME", hf_home), ("HF_TOKEN", "hf_env")]).unwrap().token;
        assert_eq!(token.as_deref(), Some("hf_env"));
        assert!(!hub(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
        assert_eq!(hub(&[]).unwrap_err().to_string(), "no home folder is known; set HF_HOME");
    }
}
