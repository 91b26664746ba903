//! The files of a task come from the hub where this machine has none.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use super::common::program::{Ran, SFT, STEER, command, ran, text};
use super::common::shared;
use super::hub::Server;

/// A working folder without data beside it, and a cache of the hub.
struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new() -> Option<Self> {
        let model = fs::canonicalize(shared("models/stories260k")?).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        let template = "{% for m in messages %}{{ m.content }} = {% endfor %}";
        fs::write(folder.path().join("work/template.jinja"), template).unwrap();
        Some(Place { folder, model })
    }

    /// A program on GSM8K that knows no folder of data.
    fn gsm8k(&self, program: &str, flags: &[&str]) -> Command {
        let mut command = command(program, flags);
        command.args(["--dataset_name", "gsm8k", "--chat_template_path", "template.jinja"]);
        command.args(["--model_name_or_path", text(&self.model)]);
        command.current_dir(self.folder.path().join("work"));
        for name in ["STEERSMAN_DATA", "HF_HUB_CACHE", "HF_TOKEN"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.folder.path().join("hf"));
        command
    }

    /// The same with the hub at `endpoint`.
    fn online(&self, endpoint: &str, program: &str, flags: &[&str]) -> Ran {
        let mut command = self.gsm8k(program, flags);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", endpoint);
        ran(command)
    }
}

const TRAIN: [&str; 2] = ["--dry_run", "--max_length=128"];
const EVAL: [&str; 2] = ["eval", "--max_completion_length=1"];

/// A question whose number is `gold`, as a line of JSON.
fn line(question: &str, gold: usize) -> String {
    json!({"question": question, "answer": format!("It is <<{gold}>>.\n#### {gold}")}).to_string()
}

#[test]
fn gsm8k_comes_from_the_hub_where_no_folder_has_it() {
    let Some(place) = Place::new() else { return };
    let rows = |n: usize| (0..n).map(|i| line("a", i) + "\n").collect::<String>();
    let (train, test) = (rows(3), rows(2));
    let other = line("another configuration", 1);
    let files = [
        ("main/train.jsonl", train.as_str()),
        ("main/test.jsonl", test.as_str()),
        ("socratic/train.jsonl", other.as_str()),
    ];
    let server = Server::new("datasets/openai/gsm8k", &files);
    place.online(&server.endpoint, SFT, &TRAIN).ok();
    assert!(server.requests().iter().any(|path| path.ends_with("main/test.jsonl")));
    let online = place.online(&server.endpoint, STEER, &EVAL).ok();
    let answered = &online.stdout;
    assert!(answered.starts_with("accuracy: ") && answered.contains("/2"), "{answered}");
    let told = "gsm8k/test.jsonl was not found: openai/gsm8k of the hub is used, in ";
    assert_eq!(online.stderr.matches(told).count(), 1, "{online:?}");
    let again = ran(place.gsm8k(STEER, &EVAL)).ok().stdout;
    assert_eq!(again.lines().next(), answered.lines().next(), "offline, from the cache");
}

#[test]
fn files_on_this_machine_are_used_without_asking_the_hub() {
    let Some(place) = Place::new() else { return };
    let server = Server::new("datasets/openai/gsm8k", &[]);
    let data = place.folder.path().join("shared/data/gsm8k");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("test.jsonl"), line("a", 7)).unwrap();
    let answered = place.online(&server.endpoint, STEER, &EVAL).ok().stdout;
    assert!(answered.contains("/1"), "{answered}");
    assert_eq!(server.requests(), [""; 0]);
}

#[test]
fn gsm8k_that_is_nowhere_says_where_was_looked_and_what_the_hub_said() {
    let Some(place) = Place::new() else { return };
    let wanted = [
        "(looked for ../shared/data/gsm8k/test.jsonl; STEERSMAN_DATA is not set), and openai/gsm8k",
        "could not be fetched: ",
        "set STEERSMAN_DATA to a folder that holds gsm8k/test.jsonl",
        "HF_HUB_OFFLINE is set and openai/gsm8k is not in the cache",
    ];
    let offline = ran(place.gsm8k(STEER, &EVAL));
    for part in wanted {
        assert!(offline.only_sentence(1).contains(part), "{offline:?}");
    }
    let server = Server::new("datasets/openai/other", &[]);
    let refused = place.online(&server.endpoint, SFT, &TRAIN);
    let said = refused.only_sentence(1);
    assert!(said.contains("gsm8k/train.jsonl was not found"), "{said}");
    assert!(said.contains("has no files of openai/gsm8k"), "{said}");
    let flags = ["eval", "--dataset_test_split=dev"];
    let unknown = place.online(&server.endpoint, STEER, &flags);
    assert!(unknown.only_sentence(2).contains("gsm8k has no split dev"), "{unknown:?}");
}
