//! A supervised run around its trainer: folder, metrics, evaluations, checkpoints, the best one, and
//! the end.

use std::time::{Duration, Instant};

use crate::adapter::{BaseModel, Positions};
use crate::config::{Adapter, BestMetric, EvalAccuracy, SftConfig, read_toml, to_toml};
use crate::eval::Tally;
use crate::report::{Event, MetricLine, Metrics, Reporter};
use crate::{Error, Result};

use super::checkpoint::{self, Window, checkpoint_dir, prune};
use super::claim::{CONFIG_FILE, Claim};
use super::example::TokenExample;
use super::sft::{SftTrainer, StepReport};
use crate::files::{verify, write_atomic};

/// Measures the accuracy of the current adapters, if the data can be graded.
pub type AccuracyCheck<'a> = &'a dyn Fn(&SftTrainer) -> Result<Tally>;

/// What is evaluated.
#[derive(Clone, Copy)]
pub struct HeldOut<'a> {
    /// Examples whose loss is taken.
    pub examples: &'a [TokenExample],
    /// Greedy accuracy on the test problems.
    pub accuracy: Option<AccuracyCheck<'a>>,
}

/// Refuses, before anything is trained, a run that its rows cannot serve: evaluations that are to
/// decide something without a row to evaluate on, and steering of prompts that rows do not have.
///
/// # Errors
/// Usage: names the key, and the row.
pub fn check_rows(config: &SftConfig, train: &[TokenExample], test: &[TokenExample]) -> Result<()> {
    let (run, adapter) = (&config.train, &config.adapter);
    let evaluates =
        run.eval_steps > 0 || run.load_best_model_at_end || run.early_stopping_patience > 0;
    if evaluates && test.is_empty() {
        return Err(Error::usage(
            "eval_steps is above 0 and no row is held out to evaluate on: set max_eval_samples above \
             0 to hold out rows of a file, name a split of the folder as dataset_test_split, or set \
             eval_steps = 0",
        ));
    }
    let steers = adapter.adapter != Adapter::Lora && adapter.adapter_name_or_path.is_none();
    if steers && adapter.steering_positions != Positions::All {
        let all = train.iter().chain(test);
        if let Some(example) = all.into_iter().find(|example| example.prompt_length == 0) {
            let (row, positions) = (example.row, adapter.steering_positions);
            return Err(Error::usage(format!(
                "row {row} has no prompt, and steering_positions = \"{positions}\" steers nothing \
                 else: use rows with prompt and completion, or steering_positions = \"all\""
            )));
        }
    }
    Ok(())
}

/// A supervised run and its folder.
pub struct SftRun {
    config: SftConfig,
    base: BaseModel,
    reporter: Reporter,
    /// Holds the folder until the run is over.
    _claim: Claim,
}

impl SftRun {
    /// Begins a run in its claimed folder, or takes it up where its last checkpoint left it.
    ///
    /// # Errors
    /// If the checkpoint belongs to another run, the memory does not suffice, or the folder cannot be
    /// written.
    pub fn start(
        config: &SftConfig,
        base: BaseModel,
        mut claim: Claim,
        trainer: &mut SftTrainer,
    ) -> Result<Self> {
        let mut before = None;
        if let Some((_, folder)) = &claim.checkpoint {
            trainer.resume(folder)?;
            before = Some(read_toml::<SftConfig>(&folder.join(CONFIG_FILE))?.optim);
        }
        let plan = trainer.fit(before.as_ref())?;
        let mut config = config.clone();
        plan.resolve(&mut config.optim);
        claim.write_config(&to_toml(&config)?)?;
        let history = &trainer.state().log_history;
        let mut reporter = Reporter::for_run(&config.train.output_dir, history)?;
        for warning in std::mem::take(&mut claim.warnings) {
            reporter.emit(Event::Warning(warning))?;
        }
        let name = config.train.name();
        let (done_steps, total_steps) = (trainer.state().global_step, trainer.total_steps());
        reporter.emit(Event::RunStarted { name, done_steps, total_steps })?;
        reporter.emit(Event::Planned(plan.to_string()))?;
        Ok(SftRun { config, base, reporter, _claim: claim })
    }

    /// One optimizer step with its metrics; nothing when the run is over.
    ///
    /// # Errors
    /// If the step failed: what it worked on is kept in `dump-{step}` in the run's folder.
    pub fn step(&mut self, trainer: &mut SftTrainer) -> Result<Option<StepReport>> {
        if self.stops_early(trainer) {
            return Ok(None);
        }
        let start = Instant::now();
        let report = match trainer.step() {
            Ok(Some(report)) => report,
            Ok(None) => return Ok(None),
            Err(error) => return Err(self.dump(trainer, trainer.state().global_step + 1, error)),
        };
        let (step, time) = (report.step, start.elapsed());
        self.reporter.emit(report.event(time))?;
        let window = &mut trainer.state_mut().window;
        window.totals += report.totals;
        window.seconds += time.as_secs_f64();
        window.steps += 1;
        (window.grad_norm, window.learning_rate) = (report.grad_norm, report.learning_rate);
        let last = step == trainer.total_steps();
        if last || step.is_multiple_of(self.config.train.logging_steps as u64) {
            self.log(trainer)?;
        }
        Ok(Some(report))
    }

    /// Writes the line of metrics of the steps since the last one.
    fn log(&mut self, trainer: &mut SftTrainer) -> Result<()> {
        let state = trainer.state_mut();
        let window = std::mem::take(&mut state.window);
        let Window { totals, seconds, steps, grad_norm, learning_rate } = window;
        let time = Duration::from_secs_f64(seconds / f64::from(steps));
        let report = StepReport { step: state.global_step, totals, grad_norm, learning_rate };
        let line = report.line(state, time);
        state.log_history.push(line.clone());
        self.reporter.emit(Event::Logged(line))
    }

    /// Whether there is an evaluation now: every `eval_steps` steps, and after the last one.
    pub fn evaluates_now(&self, trainer: &SftTrainer) -> bool {
        is_due(trainer, self.config.train.eval_steps)
    }

    /// Evaluates, notes the best value so far, and with `load_best_model_at_end` saves it.
    ///
    /// # Errors
    /// If the loss is not a finite number, or a file cannot be written.
    pub fn evaluate(&mut self, trainer: &mut SftTrainer, held_out: HeldOut) -> Result<()> {
        let train = self.config.train.clone();
        let last = trainer.state().global_step == trainer.total_steps();
        let final_adapter = last && !train.load_best_model_at_end;
        let wanted = train.eval_accuracy == EvalAccuracy::Steps || final_adapter;
        let line = self.measure(trainer, held_out, wanted)?;
        let Some(value) = line.metrics.get(metric_name(train.metric_for_best_model)) else {
            return Ok(());
        };
        let best = trainer.state_mut().is_best(value, train.greater_is_better());
        match best && train.load_best_model_at_end {
            true => self.save(trainer),
            false => Ok(()),
        }
    }

    /// Evaluates before the first step; a resumed run has done so already.
    ///
    /// # Errors
    /// As [`SftRun::evaluate`].
    pub fn evaluate_before(&mut self, trainer: &mut SftTrainer, held_out: HeldOut) -> Result<()> {
        if trainer.state().global_step > 0 {
            return Ok(());
        }
        let wanted = self.config.train.eval_accuracy != EvalAccuracy::No;
        self.measure(trainer, held_out, wanted).map(drop)
    }

    fn measure(
        &mut self,
        trainer: &mut SftTrainer,
        held_out: HeldOut,
        accuracy: bool,
    ) -> Result<MetricLine> {
        let mut metrics = Metrics::new();
        if !held_out.examples.is_empty() {
            let totals = trainer.evaluate(held_out.examples)?;
            metrics.set("eval_loss", totals.loss());
            metrics.set("eval_mean_token_accuracy", totals.mean_token_accuracy());
        }
        let check = held_out.accuracy.filter(|_| accuracy);
        if let Some(check) = check.filter(|_| self.config.train.eval_accuracy != EvalAccuracy::No) {
            check(trainer)?.write(&mut metrics);
        }
        let step = trainer.state().global_step;
        if metrics.iter().next().is_some() {
            metrics.set("epoch", trainer.state().epoch);
        }
        let line = MetricLine::new(step, metrics);
        if line.metrics.iter().next().is_some() {
            trainer.state_mut().log_history.push(line.clone());
            self.reporter.emit(Event::Evaluated(line.clone()))?;
        }
        if let Some(loss) = line.metrics.get("eval_loss").filter(|loss| !loss.is_finite()) {
            let error = Error::failure(format!("step {step}: eval_loss became {loss}"));
            return Err(self.dump(trainer, step, error));
        }
        Ok(line)
    }

    /// Whether there is a checkpoint now: every `save_steps` steps, and after the last one.
    pub fn saves_now(&self, trainer: &SftTrainer) -> bool {
        is_due(trainer, self.config.train.save_steps)
    }

    /// Saves a checkpoint of this step, unless there is one, and removes old ones.
    ///
    /// # Errors
    /// If it cannot be written whole.
    pub fn save(&mut self, trainer: &SftTrainer) -> Result<()> {
        let (train, step) = (&self.config.train, trainer.state().global_step);
        let path = checkpoint_dir(&train.output_dir, step);
        if path.exists() {
            return Ok(());
        }
        let config = to_toml(&self.config)?;
        checkpoint::save(&train.output_dir, step, |folder| {
            write_atomic(&folder.join(CONFIG_FILE), config.as_bytes())?;
            trainer.save(folder, &self.base)
        })?;
        self.reporter.emit(Event::CheckpointSaved { step, path })?;
        let best = trainer.state().best_step.filter(|_| train.load_best_model_at_end);
        prune(&train.output_dir, train.save_total_limit, best)
    }

    fn stops_early(&self, trainer: &SftTrainer) -> bool {
        let patience = self.config.train.early_stopping_patience as u64;
        patience > 0 && trainer.state().evaluations_without_best >= patience
    }

    /// Saves the last step, goes back to the best checkpoint if asked, and writes the adapter into
    /// the run's folder.
    ///
    /// # Errors
    /// If a file cannot be written whole, or the best checkpoint is damaged.
    pub fn finish(&mut self, trainer: &mut SftTrainer, held_out: HeldOut) -> Result<()> {
        if trainer.state().window.steps > 0 {
            self.log(trainer)?;
        }
        self.save(trainer)?;
        let output_dir = self.config.train.output_dir.clone();
        let step = trainer.state().global_step;
        let best = trainer.state().best_step.filter(|_| self.config.train.load_best_model_at_end);
        if let Some(best) = best {
            let folder = checkpoint_dir(&output_dir, best);
            verify(&folder)?;
            trainer.restore_adapters(&folder)?;
        }
        crate::adapter::save(&output_dir, trainer.adapters(), &self.base)?;
        let message = match self.accuracies(trainer, held_out, best.unwrap_or(step))? {
            Some((before, after)) => {
                format!("accuracy before: {before}\naccuracy after:  {after}\n")
            }
            None => String::new(),
        };
        let message = message + &format!("adapter: {}", output_dir.display());
        self.reporter.emit(Event::RunEnded { step, message })
    }

    /// Accuracy before training and that of the final adapter, which is the one of step `kept`; it
    /// is measured now unless its evaluation did so.
    fn accuracies(
        &mut self,
        trainer: &mut SftTrainer,
        held_out: HeldOut,
        kept: u64,
    ) -> Result<Option<(Tally, Tally)>> {
        if self.config.train.eval_accuracy == EvalAccuracy::No {
            return Ok(None);
        }
        let history = &trainer.state().log_history;
        let tally = |line: &MetricLine| Tally::read(&line.metrics);
        let before = history.iter().find_map(tally);
        let known = history.iter().rev().filter(|line| line.step == kept).find_map(tally);
        let after = match known {
            Some(after) => Some(after),
            None => {
                let held_out = HeldOut { examples: &[], ..held_out };
                Tally::read(&self.measure(trainer, held_out, true)?.metrics)
            }
        };
        Ok(before.zip(after))
    }

    /// Keeps what a failed step worked on, and says where.
    fn dump(&self, trainer: &SftTrainer, step: u64, error: Error) -> Error {
        let folder = self.config.train.output_dir.join(format!("dump-{step}"));
        let write = || -> Result<()> {
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            trainer.save(&folder, &self.base)?;
            write_atomic(&folder.join("error.txt"), format!("{error}\n").as_bytes())
        };
        match write() {
            Ok(()) => Error::failure(format!("{error}; the state is in {}", folder.display())),
            Err(second) => {
                Error::failure(format!("{error}; the state could not be kept: {second}"))
            }
        }
    }
}

fn metric_name(metric: BestMetric) -> &'static str {
    match metric {
        BestMetric::EvalLoss => "eval_loss",
        BestMetric::EvalMeanTokenAccuracy => "eval_mean_token_accuracy",
        BestMetric::EvalAccuracy => "eval_accuracy",
    }
}

/// Whether something that comes every so many steps (0 = never), and at the end, comes now.
fn is_due(trainer: &SftTrainer, every: usize) -> bool {
    let step = trainer.state().global_step;
    step == trainer.total_steps() || (every > 0 && step.is_multiple_of(every as u64))
}
