//! Policy-gradient runs of the real program on a tiny model: ratios of 1 through whole runs, killed runs
//! that end as unbroken ones, rewards that fail, and what is left behind.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::program::{
    GRPO, Place, adapter_files, checkpoints, lines, names, series, text, timeless,
};

/// Dense enough for the completions of a group to differ.
const REWARDS: &str =
    "--reward_funcs repetition_penalty_reward(ngram=1) regex_reward(pattern=a.*a)";

/// Flags of every run.
const FIXED: &str = "--max_steps 12 --prompts_per_step 3 --num_generations 4 --save_steps 2 \
                     --max_completion_length 12 --max_eval_samples 4 --learning_rate 1e-2";

fn place() -> Option<Place> {
    Place::of(GRPO, FIXED, 24)
}

fn assert_same_run(found: &Path, wanted: &Path, what: &str) {
    assert_eq!(timeless(found), timeless(wanted), "{what}: metrics");
    assert!(adapter_files(found).len() >= 2, "{what}: no adapter");
    assert!(adapter_files(found) == adapter_files(wanted), "{what}: the adapter differs");
    assert_eq!(checkpoints(found), checkpoints(wanted), "{what}");
}

#[test]
fn the_ratio_is_one_through_whole_runs_of_every_adapter_and_loss() {
    let Some(place) = place() else { return };
    let filters = "--top_p 0.9 --top_k 40 --temperature 0.8 --repetition_penalty 1.2";
    for (i, keys) in [
        "--adapter steering --steering_kind vector",
        "--adapter steering --steering_kind linear --steering_positions first=2,last=3",
        "--adapter steering --steering_kind silu --steering_site post_mlp --beta 0.04",
        "--adapter lora --loss_type dr_grpo --scale_rewards none",
        "--adapter joint --advantage_estimator rloo --matmul_precision medium",
        "--loss_type grpo --importance_sampling_level sequence --dtype bf16",
        "--loss_type cispo --entropy_coef 0.01 --top_entropy_quantile 0.5 --matmul_precision high",
        "--advantage_estimator reinforce_plus_plus --beta 0.1 --kl_estimator k1 --kl_in_reward",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("run-{i}");
        let filters = if i % 2 == 0 { filters } else { "--min_p 0.02" };
        place.run(&name, &format!("{REWARDS} {keys} {filters} --max_steps 4")).ok();
        let dir = place.dir(&name);
        for end in ["min", "mean", "max"] {
            let ratios = series(&dir, &format!("sampling/importance_sampling_ratio/{end}"));
            // a step whose groups are all without spread computes nothing
            assert!(
                ratios.len() >= 2 && ratios.iter().all(|r| *r == 1.0),
                "{keys} {end} {ratios:?}"
            );
        }
        assert!(
            series(&dir, "grad_norm").iter().filter(|norm| **norm > 0.0).count() >= 2,
            "{keys}"
        );
        assert_eq!(series(&dir, "reward").len(), 4);
    }
}

#[test]
fn a_sampler_of_lower_precision_is_corrected_for() {
    let Some(place) = place() else { return };
    let keys = format!(
        "{REWARDS} --max_steps 4 --num_iterations 2 --dtype bf16 --rollout_matmul_precision medium"
    );
    place.run("run", &keys).ok();
    let dir = place.dir("run");
    let ratios = series(&dir, "sampling/importance_sampling_ratio/max");
    assert_eq!((ratios[0], ratios[2]), (1.0, 1.0), "the ratio is to the trainer's own log-probs");
    let corrections = series(&dir, "sampling/correction_mean");
    assert_eq!(corrections.len(), 4);
    let near = |mean: &f64| *mean != 1.0 && (mean - 1.0).abs() < 0.05;
    assert!(corrections.iter().all(near), "{corrections:?}");
}

#[test]
fn killed_runs_end_as_unbroken_ones() {
    let Some(place) = place() else { return };
    // kills in sampling, reward and update alike: a step takes some hundredths of a second
    let reward = place.dir("slow.py");
    fs::write(&reward, SLOW_REWARD).unwrap();
    let slow = format!("--reward_funcs repetition_penalty_reward(ngram=1) {}", text(&reward));
    if Command::new("python3").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: python3 is missing");
    }
    for (i, keys) in [
        format!("{slow} --adapter steering --eval_steps 4"),
        format!("{slow} --adapter lora --num_iterations 2 --save_steps 1"),
        format!("{slow} --adapter joint --dynamic_sampling --beta 0.1 --eval_steps 3"),
    ]
    .into_iter()
    .enumerate()
    {
        let unbroken = format!("unbroken-{i}");
        place.run(&unbroken, &keys).ok();
        let resume = format!("{keys} --resume_from_checkpoint latest");
        for (j, (count, after)) in
            [(1, 1), (3, 0), (3, 7), (5, 15), (6, 30)].into_iter().enumerate()
        {
            let name = format!("killed-{i}-{j}");
            place.kill(&name, &keys, |dir| {
                let come = lines(dir) >= count;
                if come {
                    std::thread::sleep(Duration::from_millis(after));
                }
                come
            });
            place.run(&name, &resume).ok();
            assert_same_run(&place.dir(&name), &place.dir(&unbroken), &format!("{keys}, kill {j}"));
        }
    }
}

/// Takes a while.
const SLOW_REWARD: &str = "import time\ndef slow(completions, **kwargs):\n    time.sleep(0.02)\n    \
    return [float(len(c) % 3) for c in completions]\n";

#[test]
fn completions_of_num_iterations_are_learnt_from_again_and_no_longer() {
    let Some(place) = place() else { return };
    place.run("run", &format!("{REWARDS} --num_iterations 3 --max_steps 6")).ok();
    let dir = place.dir("run");
    let (lows, highs) = (
        series(&dir, "sampling/importance_sampling_ratio/min"),
        series(&dir, "sampling/importance_sampling_ratio/max"),
    );
    for (i, (low, high)) in lows.iter().zip(&highs).enumerate() {
        assert_eq!(*low == 1.0 && *high == 1.0, i % 3 == 0, "step {}: {low} {high}", i + 1);
    }
    assert_eq!(series(&dir, "reward").len(), 2, "sampled every third step");
}

#[test]
fn a_reward_that_fails_too_often_stops_the_run_with_a_checkpoint_to_go_on_from() {
    let Some(place) = place() else { return };
    let file = place.dir("mine.py");
    let good =
        "def mine(completions, **kwargs):\n    return [float(len(c) % 3) for c in completions]\n";
    // the reward is tried once before the run; evaluations come before step 1, then one call a step
    let bad = "import os\ncalls = 0\ndef mine(completions, **kwargs):\n    global calls\n    \
               calls += 1\n    if calls > 5:\n        raise ValueError('no more')\n    \
               return [float(len(c) % 3) for c in completions]\n";
    fs::write(&file, bad).unwrap();
    let keys = format!("--reward_funcs {} --save_steps 100", text(&file));
    let failed = place.run("broken", &keys);
    if failed.stderr.contains("python3 cannot be started") {
        return eprintln!("SKIPPED: python3 is missing");
    }
    let said = failed.sentence(1);
    assert!(
        said.starts_with("step 4: reward mine failed for 12 of 12 completions: mine.py line 7: "),
        "{said}"
    );
    assert!(said.contains("ValueError: no more") && said.contains("checkpoint-3"), "{said}");
    let log = place.dir("broken/rewards/mine-0.stderr.log");
    assert!(said.contains(&format!("(more in {})", text(&log))) && log.exists(), "{said}");
    fs::write(&file, good).unwrap();
    place.run("broken", &format!("{keys} --resume_from_checkpoint latest")).ok();
    place.run("whole", &keys).ok();
    assert_eq!(timeless(&place.dir("broken")), timeless(&place.dir("whole")));
    assert!(adapter_files(&place.dir("broken")) == adapter_files(&place.dir("whole")));
}

#[test]
fn a_reward_that_fails_at_the_first_step_or_in_an_evaluation_loses_nothing() {
    let Some(place) = place() else { return };
    let file = place.dir("mine.py");
    let breaks = |after: usize| {
        format!(
            "calls = 0\ndef mine(completions, **kwargs):\n    global calls\n    calls += 1\n    \
             if calls == {after}:\n        raise ValueError('once')\n    \
             return [float(len(c) % 3) for c in completions]\n"
        )
    };
    let keys = format!("--reward_funcs {} --max_steps 4 --eval_steps 2", text(&file));
    fs::write(&file, breaks(0)).unwrap();
    let whole = place.run("whole", &keys);
    if whole.stderr.contains("python3 cannot be started") {
        return eprintln!("SKIPPED: python3 is missing");
    }
    // rehearsal, evaluation, step 1, step 2, evaluation
    for (call, step) in [(3, 0), (5, 2)] {
        let name = format!("broken-{call}");
        fs::write(&file, breaks(call)).unwrap();
        let failed = place.run(&name, &keys);
        assert!(failed.sentence(1).contains(&format!("checkpoint-{step}: mend")), "{failed:?}");
        fs::write(&file, breaks(0)).unwrap();
        place.run(&name, &format!("{keys} --resume_from_checkpoint latest")).ok();
        assert!(adapter_files(&place.dir(&name)) == adapter_files(&place.dir("whole")), "{call}");
        assert_eq!(series(&place.dir(&name), "reward"), series(&place.dir("whole"), "reward"));
    }
    assert_eq!(timeless(&place.dir("broken-3")), timeless(&place.dir("whole")));
}

#[test]
fn a_reward_that_fails_for_some_leaves_them_out_and_counts_them() {
    let Some(place) = place() else { return };
    let file = place.dir("mine.py");
    let some = "def mine(completions, **kwargs):\n    return [float('nan') if i % 4 == 0 else \
                None if i % 4 == 1 else float(len(c) % 3) for i, c in enumerate(completions)]\n";
    fs::write(&file, some).unwrap();
    let keys = format!("--reward_funcs {} --max_steps 3 --logging_steps 1", text(&file));
    let ran = place.run("run", &keys);
    if ran.stderr.contains("python3 cannot be started") {
        return eprintln!("SKIPPED: python3 is missing");
    }
    let said = ran.ok().stderr;
    assert_eq!(series(&place.dir("run"), "reward_outcome/error"), [3.0; 3]);
    assert_eq!(series(&place.dir("run"), "reward_failures"), [0.25; 3]);
    assert_eq!(series(&place.dir("run"), "reward_not_applicable"), [0.25; 3]);
    assert_eq!(said.matches("  reward_failures    0.2500").count(), 3, "{said}");
    let warning = "warning: step 1: reward mine failed for 3 of 12 completions, first in row ";
    assert_eq!(said.matches(warning).count(), 1, "{said}");
    assert!(said.contains(": it gave nan; they are left out of the loss"), "{said}");
    assert!(said.contains("warning: before the run: reward mine failed for 2 of 8"), "{said}");
}

#[test]
fn a_reward_that_always_fails_stops_before_anything_is_trained_and_leaves_the_folder_free() {
    let Some(place) = place() else { return };
    for (reward, wanted) in [
        (
            "accuracy_reward",
            "no gold answer in a column answer, solution, gold; its columns: completion",
        ),
        ("regex_reward(pattern=a) accuracy_reward", "no gold answer in a column"),
    ] {
        let failed = place.run("run", &format!("--reward_funcs {reward}"));
        let said = failed.sentence(1).to_string();
        assert!(said.contains(wanted) && said.contains("nothing was trained"), "{said}");
        assert!(!place.dir("run/config.toml").exists());
        assert!(!place.dir("run").exists() || checkpoints(&place.dir("run")).is_empty());
    }
    let failed = place.run("other", "--reward_funcs acuracy_reward");
    assert!(failed.only_sentence(2).contains("did you mean accuracy_reward?"));
    assert!(!place.dir("other").exists());
}

#[test]
fn a_rehearsal_starts_rewards_and_leaves_nothing() {
    let Some(place) = place() else { return };
    let file = place.dir("mine.py");
    fs::write(&file, "import no_such_module\n").unwrap();
    let tried = place.run("run", &format!("--reward_funcs {} --dry_run", text(&file)));
    if tried.stderr.contains("python3 cannot be started") {
        return eprintln!("SKIPPED: python3 is missing");
    }
    let said = tried.sentence(1);
    let wanted =
        "reward mine: mine.py line 1: ModuleNotFoundError: No module named 'no_such_module'";
    assert_eq!(said, wanted);
    let tried = place.run("run", "--reward_funcs process:no_such_command --dry_run");
    assert!(
        tried.sentence(1).starts_with("reward no_such_command: there is no program"),
        "{tried:?}"
    );
    assert!(!place.dir("run").exists());
}

#[test]
fn failures_in_an_evaluation_are_told_and_are_no_wrong_answers() {
    let Some(place) = place() else { return };
    let file = place.dir("mine.py");
    let some = "def mine(completions, **kwargs):\n    return [float('nan') if i % 2 == 0 else 2.0 \
                for i, c in enumerate(completions)]\n";
    fs::write(&file, some).unwrap();
    let ran = place.run("run", &format!("--reward_funcs {} --max_steps 1", text(&file)));
    if ran.stderr.contains("python3 cannot be started") {
        return eprintln!("SKIPPED: python3 is missing");
    }
    let said = ran.ok().stderr;
    assert_eq!(series(&place.dir("run"), "eval_reward_failures"), [0.5; 2]);
    assert_eq!(series(&place.dir("run"), "eval_reward"), [2.0; 2]);
    assert!(series(&place.dir("run"), "eval_accuracy").is_empty());
    let warning = "warning: evaluation: reward mine failed for 2 of 4 completions, first in row ";
    assert_eq!(said.matches(warning).count(), 2, "{said}");
    assert!(said.contains("reward before: 2.000 [2.000, 2.000]"), "{said}");
}

#[test]
fn a_column_that_some_rows_lack_is_told_with_the_first_row() {
    let Some(place) = place() else { return };
    let rows = text(&place.rows).to_string();
    let more = fs::read_to_string(&rows).unwrap() + "{\"prompt\": \"Lily likes\"}\n";
    fs::write(&rows, more).unwrap();
    let said = place.run("run", &format!("{REWARDS} --max_steps 1")).ok().stderr;
    let wanted = "rows.jsonl: 1 of 25 rows, row 25 the first, have no column completion: rewards get \
                  null for it";
    assert!(said.contains(wanted), "{said}");
}

#[test]
fn completions_are_shown_and_kept_as_tables() {
    let Some(place) = place() else { return };
    let keys = format!("{REWARDS} --max_steps 2 --log_completions --num_completions_to_print 3");
    let said = place.run("run", &keys).ok().stderr;
    assert_eq!(said.matches("tokens\n    ").count(), 2 * 3, "{said}");
    let folder = place.dir("run/completions");
    assert_eq!(names(&folder), ["completions_00001.parquet", "completions_00002.parquet"]);
    let rows = datasets::read_rows(&folder.join("completions_00002.parquet")).unwrap();
    assert_eq!(rows.len(), 12);
    let mean = rows.iter().map(|row| row["reward"].as_f64().unwrap()).sum::<f64>() / 12.0;
    let logged = series(&place.dir("run"), "reward")[1];
    assert!((mean - logged).abs() < 1e-12, "{mean} {logged}");
    assert!(rows.iter().all(|row| row["prompt"].as_str().unwrap().contains("likes")));
}

#[test]
fn stop_strings_end_completions_and_are_counted() {
    let Some(place) = place() else { return };
    place.run("run", &format!("{REWARDS} --max_steps 2 --stop a --stop e")).ok();
    let stopped = series(&place.dir("run"), "stop/stop_string");
    assert!(stopped.iter().all(|count| *count > 6.0), "{stopped:?}");
    assert!(series(&place.dir("run"), "completions/mean_length").iter().all(|mean| *mean < 9.0));
}

#[test]
fn the_micro_batch_and_the_number_of_sequences_change_no_metric() {
    let Some(place) = place() else { return };
    let keys = format!("{REWARDS} --max_steps 3 --beta 0.05");
    place.run("whole", &format!("{keys} --micro_batch_tokens 0")).ok();
    place.run("parts", &format!("{keys} --micro_batch_tokens 1 --max_num_seqs 2")).ok();
    let (whole, parts) = (place.dir("whole"), place.dir("parts"));
    for name in ["reward", "entropy", "kl", "loss", "grad_norm"] {
        for (a, b) in series(&whole, name).iter().zip(series(&parts, name)) {
            assert!((a - b).abs() <= 2e-5 * a.abs().max(1e-3), "{name}: {a} {b}");
        }
    }
}

#[test]
fn reusing_what_sampling_computed_changes_nothing_but_memory_and_time() {
    let Some(place) = place() else { return };
    // a step is several parts of a batch
    let step = "--prompts_per_step 6 --num_generations 8 --max_completion_length 60 --max_steps 3";
    for (i, keys) in ["--adapter lora", "--adapter steering --beta 0.1 --num_iterations 2"]
        .into_iter()
        .enumerate()
    {
        let run = |reuse: bool, micro_batch_tokens: usize| {
            let name = format!("run-{i}-{reuse}-{micro_batch_tokens}");
            let more =
                format!("--micro_batch_tokens {micro_batch_tokens} --reuse_activations {reuse}");
            let said = place.run(&name, &format!("{REWARDS} {keys} {step} {more}")).ok().stderr;
            assert_eq!(said.contains("reuse_activations on, about"), reuse, "{said}");
            place.dir(&name)
        };
        for micro_batch_tokens in [0, 400] {
            assert_same_run(&run(true, micro_batch_tokens), &run(false, micro_batch_tokens), keys);
        }
    }
    let much = "--num_generations 64 --max_completion_length 400 --memory_budget 60MiB";
    let keys = format!("{REWARDS} {much} --reuse_activations true");
    let refused = place.run("refused", &keys);
    let said = refused.only_sentence(2);
    assert!(said.contains("memory_budget has no room for: leave it unset"), "{said}");
}

#[test]
fn gradients_at_the_head_are_taken_while_sampling_only_as_long_as_most_are_learnt_from() {
    let Some(place) = place() else { return };
    let taken = |name: &str, rewards: &str, more: &str| {
        let trace = place.dir(&format!("{name}.json"));
        let keys = format!("{rewards} {more} --max_steps 3 --profile {}", text(&trace));
        place.run(name, &keys).ok();
        std::fs::read_to_string(trace).unwrap().matches("drawn gradients").count()
    };
    let reuse = "--reuse_activations true";
    let always = taken("spread", REWARDS, reuse);
    // no group has spread
    let flat = taken("flat", "--reward_funcs regex_reward(pattern=.*)", reuse);
    assert!(always >= 3 * 12 && (1..=13).contains(&flat), "{always} {flat}");
    assert_eq!(taken("off", REWARDS, ""), 0);
    assert_eq!(taken("entropy", REWARDS, &format!("{reuse} --entropy_coef 0.01")), 0);
    assert_eq!(taken("filter", REWARDS, &format!("{reuse} --top_k 5")), 0);
}

#[test]
fn updates_read_keys_from_sampling_and_at_medium_attend_in_one_block_alone() {
    let Some(place) = place() else { return };
    let counts = |name: &str, more: &str| {
        let trace = place.dir(&format!("{name}.json"));
        let keys = format!("{REWARDS} {more} --max_steps 2 --profile {}", text(&trace));
        place.run(name, &keys).ok();
        let trace = std::fs::read_to_string(trace).unwrap();
        let count = |name: &str| trace.matches(&format!("\"name\":\"{name}\"")).count();
        ["recorded", "cached keys", "attention", "attention backward"].map(count)
    };
    let reuse = "--reuse_activations true";
    let [batches, keys, attention, backward] = counts("high", reuse);
    assert!(batches >= 2 && keys == 4 * batches, "{batches} {keys}");
    assert!(attention >= backward && backward == 4 * batches, "{attention} {backward}");
    let [batches, keys, attention, backward] =
        counts("medium", &format!("{reuse} --matmul_precision medium"));
    assert!(batches >= 2 && keys == 4 * batches, "{batches} {keys}");
    assert!(attention == batches && (4 * batches..=5 * batches).contains(&backward), "{attention}");
    let [batches, keys, attention, _] = counts("off", "--matmul_precision medium");
    assert!((batches, keys) == (0, 0) && attention >= 10, "{attention}");
}

#[test]
fn an_adapter_can_be_the_start_and_the_reference() {
    let Some(place) = place() else { return };
    place.run("first", &format!("{REWARDS} --max_steps 2")).ok();
    let first = place.dir("first");
    let keys =
        format!("{REWARDS} --max_steps 1 --beta 0.1 --adapter_name_or_path {}", text(&first));
    place.run("base", &keys).ok();
    place.run("own", &format!("{keys} --reference adapter")).ok();
    assert!(series(&place.dir("base"), "kl")[0] > 0.0);
    assert_eq!(series(&place.dir("own"), "kl"), [0.0]);
}
