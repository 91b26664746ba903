//! The sink that a person watches: a progress bar where stderr is a terminal, else one aligned line
//! a logging step. Writing to a closed stderr is no error: the run goes on.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::pace::Pace;
use super::{CompletionRow, Event, MetricLine, Sink};
use crate::Result;

/// Metrics shown at a logging step, in this order, where they are given.
const LEADING: [&str; 14] = [
    "reward",
    "reward_std",
    "reward_failures",
    "frac_reward_zero_std",
    "loss",
    "grad_norm",
    "clip_ratio/region_mean",
    "learning_rate",
    "mean_token_accuracy",
    "kl",
    "completions/mean_length",
    "time/generate",
    "time/reward",
    "time/train",
];

/// Metrics shown behind a bar.
const HEADLINE: [&str; 3] = ["reward", "reward_failures", "loss"];

enum Output {
    Bar(ProgressBar),
    Plain(Box<dyn Write>),
}

/// Progress and metrics for a person.
pub struct Terminal {
    output: Output,
    pace: Pace,
    step: u64,
    total_steps: u64,
    /// What stands behind the bar besides the speed.
    headline: String,
}

impl Terminal {
    /// On stderr: a bar where it is a terminal, else plain lines.
    pub fn stderr() -> Self {
        let stderr = std::io::stderr();
        match stderr.is_terminal() {
            true => Self::new(Output::Bar(ProgressBar::with_draw_target(
                None,
                ProgressDrawTarget::stderr(),
            ))),
            false => Self::plain(stderr),
        }
    }

    /// Plain lines to a writer.
    pub fn plain(writer: impl Write + 'static) -> Self {
        Self::new(Output::Plain(Box::new(writer)))
    }

    fn new(output: Output) -> Self {
        Self { output, pace: Pace::default(), step: 0, total_steps: 0, headline: String::new() }
    }

    fn say(&mut self, line: &str) {
        match &mut self.output {
            Output::Bar(bar) => bar.println(line),
            Output::Plain(writer) => {
                let _ = writeln!(writer, "{line}");
            }
        }
    }

    /// `" 10/200"`, as wide for every step of the run.
    fn place(&self, step: u64) -> String {
        let total = self.total_steps.to_string();
        format!("step {step:>width$}/{total}", width = total.len())
    }

    /// `"1234 tokens/s  eta 3m12s"`, as far as known.
    fn speed(&self) -> String {
        let rate = self.pace.tokens_per_second().map(|rate| format!("{rate:.0} tokens/s"));
        let left = self.pace.seconds_for(self.total_steps.saturating_sub(self.step));
        let left = left.map(|seconds| format!("eta {}", duration(seconds)));
        rate.into_iter().chain(left).collect::<Vec<_>>().join("  ")
    }

    fn start(&mut self, name: &str, done_steps: u64, total_steps: u64) {
        (self.step, self.total_steps) = (done_steps, total_steps);
        match &self.output {
            Output::Bar(bar) => {
                let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}  {msg}");
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.set_prefix(name.to_string());
                bar.set_length(total_steps);
                bar.set_position(done_steps);
            }
            Output::Plain(_) if done_steps == 0 => {
                self.say(&format!("{name}: {total_steps} steps"))
            }
            Output::Plain(_) => {
                self.say(&format!("{name}: {total_steps} steps, {done_steps} of them done"))
            }
        }
    }

    fn logged(&mut self, line: &MetricLine) {
        let shown = HEADLINE.iter().filter_map(|name| Some((*name, line.metrics.get(name)?)));
        let shown = shown.filter(|(name, value)| tells(name, *value));
        let shown = shown.map(|(name, value)| format!("{name} {}", number(value)));
        self.headline = shown.collect::<Vec<_>>().join("  ");
        match &self.output {
            Output::Bar(bar) => bar.set_message(format!("{}  {}", self.headline, self.speed())),
            Output::Plain(_) => {
                let shown = LEADING
                    .iter()
                    .filter_map(|name| Some((*name, line.metrics.get(name)?)))
                    .filter(|(name, value)| tells(name, *value));
                let text = format!("{}{}  {}", self.place(line.step), columns(shown), self.speed());
                self.say(text.trim_end());
            }
        }
    }

    fn sampled(&mut self, rows: &[CompletionRow], shown: usize) {
        // spread over the step, so that several prompts are seen
        let every = (rows.len() / shown.max(1)).max(1);
        for row in rows.iter().step_by(every).take(shown) {
            let reward = row.reward.map_or("no reward".to_string(), |r| format!("reward {r}"));
            let outcome = row.outcome.map(|outcome| format!(", {outcome}")).unwrap_or_default();
            let text = row.completion.trim().replace('\n', "\n    ");
            let head = format!("  row {}: {reward}{outcome}, {} tokens", row.row, row.tokens);
            self.say(&format!("{head}\n    {text}"));
        }
    }

    fn stepped(&mut self, step: u64, tokens: u64, seconds: f64) {
        self.step = step;
        self.pace.push(tokens, seconds);
        if let Output::Bar(bar) = &self.output {
            bar.set_position(step);
            bar.set_message(format!("{}  {}", self.headline, self.speed()));
        }
    }
}

impl Sink for Terminal {
    fn take(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::RunStarted { name, done_steps, total_steps } => {
                self.start(name, *done_steps, *total_steps)
            }
            Event::Planned(plan) => self.say(&format!("memory: {plan}")),
            Event::Step { step, tokens, seconds } => self.stepped(*step, *tokens, *seconds),
            Event::Logged(line) => self.logged(line),
            Event::Evaluated(line) => {
                let shown = line.metrics.iter();
                let shown = shown.filter(|(name, value)| is_shown(name) && tells(name, *value));
                let text = self.place(line.step) + &columns(shown);
                self.say(&text);
            }
            Event::CheckpointSaved { step, path } => {
                let text = format!("{}  saved {}", self.place(*step), path.display());
                self.say(&text);
            }
            Event::Sampled { rows, shown } => self.sampled(rows, *shown),
            Event::Note(text) => self.say(text),
            Event::Warning(text) => self.say(&format!("warning: {text}")),
            Event::RunEnded { message, .. } => {
                if let Output::Bar(bar) = &self.output {
                    bar.finish();
                }
                self.say(message);
            }
        }
        Ok(())
    }
}

/// Whether a person sees an evaluation's metric: counts of one kind, as `eval_a/b`, are left out.
fn is_shown(name: &str) -> bool {
    name.starts_with("eval_") && !name.contains('/')
}

/// `"  loss    1.2345  grad_norm    0.5000"`, columns of the same width in every line.
fn columns<'a>(metrics: impl Iterator<Item = (&'a str, f64)>) -> String {
    metrics.map(|(name, value)| format!("  {name} {:>9}", number(value))).collect()
}

/// Whether a metric has something to tell: shares of failures only where there are any.
fn tells(name: &str, value: f64) -> bool {
    value != 0.0 || !name.ends_with("reward_failures")
}

/// Five significant digits or so: `0.4200`, `12.345`, `2.00e-4`.
fn number(value: f64) -> String {
    match value.abs() {
        size if size != 0.0 && !(1e-2..1e5).contains(&size) && value.is_finite() => {
            format!("{value:.2e}")
        }
        size if size < 10.0 => format!("{value:.4}"),
        size if size < 100.0 => format!("{value:.3}"),
        _ => format!("{value:.1}"),
    }
}

/// Seconds as `45s`, `3m12s`, `2h05m` or `1d03h`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Metrics, Reporter};
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone, Default)]
    struct Page(Rc<RefCell<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn plain_lines_are_aligned() {
        let page = Page::default();
        let mut reporter = Reporter::new().with(Terminal::plain(page.clone()));
        let name = "sft".to_string();
        let metrics = |loss| Metrics::new().with("loss", loss).with("grad_norm", 0.5);
        let events = [
            Event::RunStarted { name, done_steps: 0, total_steps: 200 },
            Event::Logged(MetricLine::new(0, metrics(3.0))),
            Event::Step { step: 10, tokens: 500, seconds: 0.5 },
            Event::Logged(MetricLine::new(10, metrics(12.3456).with("epoch", 1.0))),
            Event::Evaluated(MetricLine::new(10, Metrics::new().with("eval_loss", 2e-4))),
            Event::CheckpointSaved { step: 10, path: "runs/sft/checkpoint-10".into() },
            Event::Warning("one row was cut".to_string()),
            Event::RunEnded { step: 200, message: "done".to_string() },
        ];
        events.into_iter().for_each(|event| reporter.emit(event).unwrap());
        let text = String::from_utf8(page.0.borrow().clone()).unwrap();
        assert_eq!(
            text,
            "sft: 200 steps\n\
             step   0/200  loss    3.0000  grad_norm    0.5000\n\
             step  10/200  loss    12.346  grad_norm    0.5000  1000 tokens/s  eta 1m35s\n\
             step  10/200  eval_loss   2.00e-4\n\
             step  10/200  saved runs/sft/checkpoint-10\n\
             warning: one row was cut\n\
             done\n"
        );
    }

    #[test]
    fn counts_of_outcomes_are_left_out_of_an_evaluation_line() {
        let page = Page::default();
        let metrics = Metrics::new().with("eval_accuracy", 0.5).with("epoch", 1.0);
        let metrics = metrics.with("eval_reward_outcome/right", 4.0);
        let metrics = metrics.with("eval_reward_failures", 0.0);
        let mut terminal = Terminal::plain(page.clone());
        terminal.take(&Event::Evaluated(MetricLine::new(3, metrics))).unwrap();
        let text = String::from_utf8(page.0.borrow().clone()).unwrap();
        assert_eq!(text, "step 3/0  eval_accuracy    0.5000\n");
    }

    #[test]
    fn failing_rewards_are_shown_where_there_are_any() {
        let page = Page::default();
        let mut terminal = Terminal::plain(page.clone());
        for (step, share) in [(1, 0.0), (2, 0.25)] {
            let metrics = Metrics::new().with("reward", 1.0).with("reward_failures", share);
            terminal.take(&Event::Logged(MetricLine::new(step, metrics))).unwrap();
        }
        let text = String::from_utf8(page.0.borrow().clone()).unwrap();
        assert_eq!(
            text,
            "step 1/0  reward    1.0000\nstep 2/0  reward    1.0000  reward_failures    0.2500\n"
        );
    }

    #[test]
    fn the_bar_takes_every_event_without_a_terminal() {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let mut terminal = Terminal::new(Output::Bar(bar.clone()));
        let name = "sft".to_string();
        terminal.take(&Event::RunStarted { name, done_steps: 5, total_steps: 9 }).unwrap();
        assert_eq!((bar.position(), bar.length()), (5, Some(9)));
        let metrics = Metrics::new().with("loss", 0.25).with("reward", 1.5);
        terminal.take(&Event::Logged(MetricLine::new(6, metrics))).unwrap();
        terminal.take(&Event::Step { step: 6, tokens: 10, seconds: 2.0 }).unwrap();
        assert_eq!(bar.position(), 6);
        assert_eq!(bar.message(), "reward 1.5000  loss 0.2500  5 tokens/s  eta 6s");
        terminal.take(&Event::RunEnded { step: 9, message: "done".to_string() }).unwrap();
        assert!(bar.is_finished());
    }

    #[test]
    fn times_and_numbers_are_short() {
        let times = [0.4, 59.6, 192.0, 7500.0, 97200.0].map(duration);
        assert_eq!(times, ["0s", "1m00s", "3m12s", "2h05m", "1d03h"]);
        let numbers = [0.0, -0.5, 123456.0, 1234.56, f64::NAN].map(number);
        assert_eq!(numbers, ["0.0000", "-0.5000", "1.23e5", "1234.6", "NaN"]);
    }
}
