//! Rewards in processes that hang, crash, talk nonsense or are killed: nothing is hidden, nothing lost,
//! and the next call works where it can.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use datasets::{Prompt, Row};
use reward::{Judged, ParseOptions, RewardSet, Sample, Score, parse};
use serde_json::json;

/// A folder with a Python reward, or nothing (with a visible line) without Python.
fn python(text: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED: python3 is missing");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.py");
    fs::write(&file, text).unwrap();
    Some((dir, file))
}

fn options(dir: &Path, num_workers: usize) -> ParseOptions {
    ParseOptions {
        timeout: Duration::from_secs(2),
        num_workers,
        stderr_dir: Some(dir.join("rewards")),
        ..ParseOptions::default()
    }
}

fn set(spec: &str, options: &ParseOptions) -> RewardSet {
    RewardSet::new(vec![parse(spec, options).unwrap()], Vec::new()).unwrap()
}

fn score(set: &mut RewardSet, completions: &[&str]) -> Vec<Judged> {
    let prompt = Prompt::Text("p".into());
    let rows: Vec<Row> = (0..completions.len())
        .map(|i| [("answer".to_string(), json!(i.to_string()))].into_iter().collect())
        .collect();
    let ids = [7, 8];
    let samples: Vec<Sample> = completions
        .iter()
        .zip(&rows)
        .map(|(completion, columns)| Sample {
            prompt: &prompt,
            completion,
            completion_ids: &ids,
            columns,
        })
        .collect();
    set.score(&samples)
}

fn rewards(judged: &[Judged]) -> Vec<Option<f64>> {
    judged.iter().map(|judged| judged.reward).collect()
}

fn reason(judged: &[Judged]) -> String {
    match &judged[0].scores[0] {
        Score::Error(reason) => reason.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_python_function_gets_trls_arguments_and_its_prints_do_no_harm() {
    let text = "def helper(x):\n    return x\n\n\
                def length_reward(prompts, completions, completion_ids, answer, **kwargs):\n    \
                print('noise')\n    assert prompts == ['p'] * 3 and completion_ids == [[7, 8]] * 3\n    \
                return [None if a == '1' else len(c) for c, a in zip(completions, answer)]\n";
    let Some((dir, file)) = python(text) else { return };
    for workers in [1, 1] {
        let mut set = set(file.to_str().unwrap(), &options(dir.path(), workers));
        assert_eq!(set.names(), ["mine"]);
        set.start().unwrap();
        let judged = score(&mut set, &["abc", "x", "é"]);
        assert_eq!(rewards(&judged), [Some(3.0), None, Some(1.0)]);
        assert_eq!(judged[1].scores, [Score::NotApplicable]);
    }
    let log = fs::read_to_string(dir.path().join("rewards/mine-0.stderr.log")).unwrap();
    assert_eq!(log, "noise\nnoise\n");
}

#[test]
fn several_workers_share_the_samples_in_order() {
    let text = "import os\ndef f(completions, **kwargs):\n    return [float(c) for c in completions]\n\
                async def g(completions):\n    return [os.getpid()] * len(completions)\n";
    let Some((dir, file)) = python(text) else { return };
    let named = |function: &str| format!("{}:{function}", file.display());
    let mut numbers = set(&named("f"), &options(dir.path(), 3));
    let all: Vec<String> = (0..10).map(|i| i.to_string()).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let want: Vec<Option<f64>> = (0..10).map(|i| Some(f64::from(i))).collect();
    assert_eq!(rewards(&score(&mut numbers, &all)), want);
    assert_eq!(rewards(&score(&mut numbers, &["5"])), [Some(5.0)]);
    let pids = rewards(&score(&mut set(&named("g"), &options(dir.path(), 2)), &["a", "b"]));
    assert_ne!(pids[0], pids[1]);
}

#[test]
fn large_calls_and_answers_pass_through_the_pipes() {
    let Some((dir, file)) =
        python("def f(completions):\n    return [len(c) for c in completions]\n")
    else {
        return;
    };
    let long = "x".repeat(300_000);
    let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
    let judged = score(&mut set, &[long.as_str(); 20]);
    assert_eq!(rewards(&judged), [Some(300_000.0); 20]);
}

#[test]
fn a_reward_that_hangs_times_out_and_works_again() {
    let text = "import time\ndef f(completions):\n    if 'hang' in completions:\n        \
                time.sleep(1000)\n    return [1.0] * len(completions)\n";
    let Some((dir, file)) = python(text) else { return };
    let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
    set.start().unwrap();
    let start = Instant::now();
    let judged = score(&mut set, &["hang", "b"]);
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(
        judged.iter().all(|judged| judged.scores == [Score::Timeout] && judged.reward.is_none())
    );
    assert_eq!(rewards(&score(&mut set, &["a"])), [Some(1.0)]);
}

#[test]
fn a_slow_reward_within_its_time_is_fine() {
    let text = "import time\ndef f(completions):\n    time.sleep(0.5)\n    return [1.0]\n";
    let Some((dir, file)) = python(text) else { return };
    let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
    assert_eq!(rewards(&score(&mut set, &["a"])), [Some(1.0)]);
}

#[test]
fn what_is_wrong_with_a_file_shows_when_it_is_started() {
    for (text, wanted) in [
        (
            "import no_such_module\ndef f(completions):\n    return []\n",
            "reward mine: mine.py line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("x = 1\ndef f(:\n", "mine.py line 2: SyntaxError"),
        ("x = 1\n", "mine.py has no function"),
        ("def f(completions): pass\ndef g(completions): pass\n", "has several functions (f, g)"),
        ("raise SystemExit(3)\n", "it ended with exit code 3"),
    ] {
        let Some((dir, file)) = python(text) else { return };
        let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
        let error = set.start().unwrap_err();
        assert!(error.contains(wanted), "{error}");
        let reason = reason(&score(&mut set, &["a"]));
        assert!(wanted.contains(&reason) || reason.contains(wanted), "{reason}");
    }
}

#[test]
fn an_exception_is_told_with_its_line_and_the_next_call_works() {
    let text = "def f(completions, answer):\n    return [1 / len(c) for c in completions]\n";
    let Some((dir, file)) = python(text) else { return };
    let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
    let judged = score(&mut set, &["", "a"]);
    assert_eq!(reason(&judged), "mine.py line 2: ZeroDivisionError: division by zero");
    assert_eq!(rewards(&judged), [None, None]);
    assert_eq!(rewards(&score(&mut set, &["ab"])), [Some(0.5)]);
}

#[test]
fn what_is_no_reward_is_told_for_its_sample_alone() {
    let text = "def f(completions):\n    return [float('nan'), float('-inf'), 'x', None, True]\n";
    let Some((dir, file)) = python(text) else { return };
    let judged = score(&mut set(file.to_str().unwrap(), &options(dir.path(), 1)), &["a"; 5]);
    assert_eq!(rewards(&judged), [None, None, None, None, Some(1.0)]);
    let told = |i: usize| format!("{:?}", judged[i].scores[0]);
    assert!(told(0).contains("it gave nan") && told(1).contains("-inf"), "{judged:?}");
    assert!(told(2).contains("which is no number") && told(3) == "NotApplicable", "{judged:?}");
}

#[test]
fn the_wrong_number_of_rewards_is_told() {
    let Some((dir, file)) = python("def f(completions):\n    return [1.0]\n") else { return };
    let judged = score(&mut set(file.to_str().unwrap(), &options(dir.path(), 1)), &["a"; 3]);
    assert_eq!(reason(&judged), "it gave 1 reward for 3 completions");
}

#[test]
fn a_function_that_returns_no_list_or_wants_a_column_that_is_not_there_is_told() {
    for (text, wanted) in [
        (
            "def f(completions):\n    pass\n",
            "f returned None and not a list of one number a completion",
        ),
        (
            "def f(completions):\n    return {'a': 1}\n",
            "f returned {'a': 1} and not a list of one number a completion",
        ),
        (
            "def f(completions, solution, level, top=3):\n    return [1.0]\n",
            "f wants solution, level, which the rows do not have; it can get answer, prompts, \
             completions, completion_ids",
        ),
    ] {
        let Some((dir, file)) = python(text) else { return };
        let judged = score(&mut set(file.to_str().unwrap(), &options(dir.path(), 1)), &["a"]);
        assert_eq!(reason(&judged), wanted);
    }
}

#[test]
fn a_log_is_named_once_it_holds_something() {
    let text = "def f(completions):\n    if completions[0] == 'b':\n        print('b')\n    \
                return [float('nan')]\n";
    let Some((dir, file)) = python(text) else { return };
    let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
    score(&mut set, &["a"]);
    assert_eq!(set.logs(), [None]);
    score(&mut set, &["b"]);
    assert_eq!(set.logs(), [Some(dir.path().join("rewards/mine-0.stderr.log"))]);
}

#[test]
fn a_process_that_crashes_is_started_again_and_a_crash_loop_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("once.sh");
    // dies at its first call, unless it has done so before
    let text = "read call\nif [ ! -e dead ]; then touch dead; exit 7; fi\n\
                while true; do echo '{\"rewards\": [2]}'; read call || exit; done\n";
    fs::write(&script, text).unwrap();
    let command = |body: &str| format!("process:sh -c 'cd {}; {body}'", dir.path().display());
    let mut once = set(&command("sh once.sh"), &options(dir.path(), 1));
    once.start().unwrap();
    assert_eq!(rewards(&score(&mut once, &["a"])), [Some(2.0)]);
    assert!(dir.path().join("dead").exists());

    let mut always = set(&command("echo broken >&2; exit 5"), &options(dir.path(), 1));
    let judged = score(&mut always, &["a", "b"]);
    assert_eq!(reason(&judged), "it ended with exit code 5; the last that it said: broken");
    assert_eq!(rewards(&judged), [None, None]);
}

#[test]
fn a_worker_that_is_killed_from_outside_is_replaced() {
    let text = "import os\ndef f(completions):\n    return [os.getpid()] * len(completions)\n";
    let Some((dir, file)) = python(text) else { return };
    let mut set = set(file.to_str().unwrap(), &options(dir.path(), 1));
    let first = rewards(&score(&mut set, &["a"]))[0].unwrap();
    Command::new("kill").args(["-9", &format!("{first}")]).status().unwrap();
    let second = rewards(&score(&mut set, &["a"]))[0].unwrap();
    assert_ne!(first, second);
}

#[test]
fn garbage_is_told_and_does_not_shift_later_answers() {
    let dir = tempfile::tempdir().unwrap();
    let body = "read a; echo hello; echo \"{\\\"rewards\\\": [9]}\"; read b";
    let mut set = set(&format!("process:sh -c '{body}'"), &options(dir.path(), 1));
    for _ in 0..2 {
        let reason = reason(&score(&mut set, &["a"]));
        assert!(reason.contains("it answered \"hello\""), "{reason}");
    }
}

#[test]
fn processes_end_with_their_reward_and_what_they_started_too() {
    let dir = tempfile::tempdir().unwrap();
    let body = format!("sleep 1000 & echo $! > {}/pid; read a; sleep 1000", dir.path().display());
    let mut set = set(&format!("process:sh -c '{body}'"), &options(dir.path(), 1));
    assert_eq!(score(&mut set, &["a"])[0].scores, [Score::Timeout]);
    let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
    let gone = || !Path::new("/proc").join(pid.trim()).join("exe").exists();
    let start = Instant::now();
    while !gone() && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(gone(), "process {pid} is left over");
}

#[test]
fn a_command_that_does_not_exist_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let judged = score(&mut set("process:no_such_command x", &options(dir.path(), 1)), &["a"]);
    assert!(reason(&judged).contains("it ended with exit code 127"), "{judged:?}");
    for (command, first) in [("no_such_command x", "no_such_command"), ("./none --a", "./none")] {
        let error =
            set(&format!("process:{command}"), &options(dir.path(), 1)).start().unwrap_err();
        assert!(error.ends_with(&format!(
            "there is no program {first}: give its path, or one that PATH has"
        )));
    }
    set("process:cat", &options(dir.path(), 1)).start().unwrap();
}
