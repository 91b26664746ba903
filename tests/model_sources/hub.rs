//! The hub client against a small hub on loopback.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use steersman::Result;
use steersman::model::hub::{Hub, RepoKind};

/// What the server has and what it was asked.
#[derive(Default)]
struct State {
    /// Path after the host → content.
    files: BTreeMap<String, Vec<u8>>,
    /// Requests without this token are refused.
    token: Option<String>,
    /// Every body stops after so many bytes.
    cut: Option<usize>,
    /// Paths asked for, in order.
    requests: Vec<String>,
}

/// A hub that answers until the test is over.
pub struct Server {
    /// Its address.
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// A hub with the files of `repo` (`owner/name`, or `datasets/owner/name`).
    pub fn new(repo: &str, files: &[(&str, &str)]) -> Server {
        let mut state = State::default();
        for (name, content) in files {
            let path = format!("/{repo}/resolve/main/{name}");
            state.files.insert(path, content.as_bytes().to_vec());
        }
        let names: Vec<_> =
            files.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"sha": "c0ffee", "siblings": names}).to_string();
        state.files.insert(format!("/api/{repo}/revision/main"), info.into_bytes());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || answer(stream, &shared));
            }
        });
        Server { endpoint, state }
    }

    fn hub(&self, cache: &Path) -> Hub {
        let cache = cache.to_path_buf();
        Hub { endpoint: self.endpoint.clone(), cache, token: None, offline: false }
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

/// Reads one request and answers it as the hub does: small files directly, safetensors through a
/// redirect to a store of large files.
fn answer(stream: TcpStream, state: &Mutex<State>) {
    let mut lines = BufReader::new(&stream).lines().map_while(|line| line.ok());
    let request = lines.next().unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_string())))
        .collect();
    let mut state = state.lock().unwrap();
    state.requests.push(path.clone());
    let stored = path.trim_start_matches("/large");
    let refused = state
        .token
        .as_ref()
        .is_some_and(|token| headers.get("authorization") != Some(&format!("Bearer {token}")));
    let (status, extra, body) = match state.files.get(stored) {
        _ if refused => ("401 Unauthorized", String::new(), vec![]),
        None => ("404 Not Found", String::new(), vec![]),
        Some(_) if path == stored && path.ends_with(".safetensors") => {
            ("302 Found", format!("Location: /large{path}\r\n"), vec![])
        }
        Some(content) => ranged(content, headers.get("range").map(String::as_str)),
    };
    let name = Path::new(stored).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let head = format!(
        "HTTP/1.1 {status}\r\n{extra}Content-Length: {}\r\nX-Repo-Commit: c0ffee\r\n\
         ETag: \"{name}-1\"\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let sent = if body.len() > 1 { state.cut.unwrap_or(body.len()) } else { body.len() };
    let mut stream = &stream;
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body[..sent.min(body.len())]);
}

/// A part of a file, `bytes=a-b` with either end open, or all of it.
fn ranged(content: &[u8], range: Option<&str>) -> (&'static str, String, Vec<u8>) {
    let bounds = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let Some((first, last)) = bounds else {
        return ("200 OK", String::new(), content.to_vec());
    };
    let first: usize = first.parse().unwrap();
    let end = last.parse().map_or(content.len(), |last: usize| last + 1).min(content.len());
    let extra = format!("Content-Range: bytes {first}-{}/{}\r\n", end - 1, content.len());
    ("206 Partial Content", extra, content[first..end].to_vec())
}

const MODEL: [(&str, &str); 4] = [
    ("config.json", r#"{"model_type": "llama"}"#),
    ("tokenizer.json", "{}"),
    ("model.safetensors", "these are the weights"),
    ("training_log.txt", "not of interest"),
];

fn fetch(hub: &Hub) -> Result<PathBuf> {
    hub.fetch(RepoKind::Model, "owner/name")
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn a_model_is_downloaded_once_and_then_used_without_a_request() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new("owner/name", &MODEL);
    let folder = fetch(&server.hub(cache.path())).unwrap();
    assert_eq!(read(&folder, "model.safetensors"), "these are the weights");
    assert_eq!(read(&folder, "tokenizer.json"), "{}");
    assert!(!folder.join("generation_config.json").exists());
    assert!(!folder.join("training_log.txt").exists());
    assert!(folder.ends_with("models--owner--name/snapshots/c0ffee"), "{folder:?}");
    assert!(!server.requests().is_empty());
    assert_eq!(fetch(&server.hub(cache.path())).unwrap(), folder);
    assert_eq!(server.requests(), [""; 0]);
}

#[test]
fn a_models_configuration_is_fetched_without_its_weights() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new("owner/name", &MODEL);
    let hub = server.hub(cache.path());
    let folder = hub.fetch(RepoKind::ModelConfig, "owner/name").unwrap();
    assert_eq!(read(&folder, "tokenizer.json"), "{}");
    assert!(!folder.join("model.safetensors").exists());
    assert_eq!(fetch(&hub).unwrap(), folder);
    assert_eq!(read(&folder, "model.safetensors"), "these are the weights");
}

#[test]
fn shards_are_fetched_by_their_index() {
    let cache = tempfile::tempdir().unwrap();
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors",
        "c": "model-1.safetensors"}}"#;
    let server = Server::new(
        "owner/name",
        &[
            ("config.json", "{}"),
            ("model.safetensors.index.json", index),
            ("model-1.safetensors", "first"),
            ("model-2.safetensors", "second"),
        ],
    );
    let folder = fetch(&server.hub(cache.path())).unwrap();
    assert_eq!(read(&folder, "model-2.safetensors"), "second");
    server.requests();
    // an interrupted download: one shard is not there yet
    std::fs::remove_file(folder.join("model-1.safetensors")).unwrap();
    fetch(&server.hub(cache.path())).unwrap();
    assert_eq!(read(&folder, "model-1.safetensors"), "first");
    assert!(server.requests().iter().all(|path| !path.contains("model-2")));
}

#[test]
fn offline_only_the_cache_is_used() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new("owner/name", &MODEL);
    let offline = Hub { offline: true, ..server.hub(cache.path()) };
    let error = fetch(&offline).unwrap_err();
    assert!(error.to_string().starts_with("HF_HUB_OFFLINE is set and owner/name is not in"));
    assert_eq!((error.exit_code(), server.requests().len()), (1, 0));
    let folder = fetch(&server.hub(cache.path())).unwrap();
    server.requests();
    assert_eq!(fetch(&offline).unwrap(), folder);
    assert_eq!(server.requests(), [""; 0]);
}

#[test]
fn the_token_is_sent_and_its_absence_explained() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new("owner/name", &MODEL);
    server.state.lock().unwrap().token = Some("hf_secret".to_string());
    let hub = server.hub(cache.path());
    let error = fetch(&hub).unwrap_err();
    assert!(error.to_string().contains("needs a token; set HF_TOKEN"), "{error}");
    assert_eq!(error.exit_code(), 2);
    fetch(&Hub { token: Some("hf_secret".to_string()), ..hub }).unwrap();
}

#[test]
fn a_missing_repository_and_missing_weights_are_told_apart() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new("owner/name", &[("config.json", "{}")]);
    let hub = server.hub(cache.path());
    let error = hub.fetch(RepoKind::Model, "owner/other").unwrap_err();
    let expected = format!("{} has no config.json of owner/other", server.endpoint);
    assert_eq!((error.to_string(), error.exit_code()), (expected, 2));
    let error = fetch(&hub).unwrap_err().to_string();
    assert!(error.contains("has neither model.safetensors nor model.safetensors.index.json"));
}

#[test]
fn a_download_that_breaks_off_fails_and_is_resumed_next_time() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new("owner/name", &MODEL);
    let hub = server.hub(cache.path());
    server.state.lock().unwrap().cut = Some(3);
    let error = fetch(&hub).unwrap_err();
    assert!(error.to_string().starts_with("cannot download config.json of owner/name"), "{error}");
    server.state.lock().unwrap().cut = None;
    let folder = fetch(&hub).unwrap();
    assert_eq!(read(&folder, "config.json"), MODEL[0].1);
    assert_eq!(read(&folder, "model.safetensors"), MODEL[2].1);
}

#[test]
fn a_server_that_is_not_there_is_one_sentence() {
    let cache = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let hub = Hub { endpoint, cache: cache.path().to_path_buf(), token: None, offline: false };
    let error = fetch(&hub).unwrap_err().to_string();
    assert!(error.starts_with("cannot download config.json of owner/name from"), "{error}");
    assert!(!error.contains('\n'));
}

#[test]
fn the_rows_of_a_data_set_are_fetched_and_nothing_outside_its_folder() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::new(
        "datasets/owner/name",
        &[("README.md", "about"), ("main/train.jsonl", "{\"a\": 1}"), ("../../outside.json", "{}")],
    );
    let hub = server.hub(cache.path());
    let folder = hub.fetch(RepoKind::Dataset, "owner/name").unwrap();
    assert_eq!(read(&folder, "main/train.jsonl"), "{\"a\": 1}");
    assert!(!folder.join("README.md").exists());
    assert!(server.requests().iter().all(|path| !path.contains("outside")));
    let offline = Hub { offline: true, ..hub };
    let again = offline.fetch(RepoKind::Dataset, "owner/name").unwrap();
    assert_eq!(read(&again, "main/train.jsonl"), "{\"a\": 1}");
}
