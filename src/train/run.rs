//! A run around its trainer: folder, metrics, evaluations, checkpoints, the best one, and the end.

use std::path::Path;
use std::time::Instant;

use crate::adapter::BaseModel;
use crate::config::{BestMetric, EvalAccuracy, OptimArgs, TrainArgs, TrainConfig};
use crate::config::{read_toml, to_toml};
use crate::eval::Tally;
use crate::report::{Event, MetricLine, Metrics, Reporter, StepMetrics};
use crate::{Error, Result};

use super::checkpoint::{self, checkpoint_dir, prune};
use super::claim::{CONFIG_FILE, Claim};
use super::learner::Learner;
use super::plan::Plan;
use crate::files::{verify, write_atomic};

/// What one optimizer step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Tokens that were learnt from: of sequences, or of fresh prompts and completions.
    pub tokens: usize,
    /// The step's metrics.
    pub metrics: StepMetrics,
}

/// A trainer as its run sees it.
pub trait Trainer<'a> {
    /// Adapters, optimizer and state.
    fn learner(&self) -> &Learner<'a>;

    /// Adapters, optimizer and state, to note evaluations in.
    fn learner_mut(&mut self) -> &mut Learner<'a>;

    /// Fits the steps into memory; `before` is the configuration of the run that goes on here.
    ///
    /// # Errors
    /// Usage, if they do not fit.
    fn fit(&mut self, before: Option<&OptimArgs>) -> Result<Plan>;

    /// Puts what else a checkpoint must hold into `folder`.
    ///
    /// # Errors
    /// If a file cannot be written whole.
    fn save_more(&self, _folder: &Path) -> Result<()> {
        Ok(())
    }

    /// Takes up what [`Trainer::save_more`] put into `folder`.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    fn resume_more(&mut self, _folder: &Path) -> Result<()> {
        Ok(())
    }
}

/// What a run evaluates its trainer on; the names of metrics begin with `eval_`.
pub trait Evaluation<T> {
    /// Metrics of the loss on held-out rows, if one is taken.
    ///
    /// # Errors
    /// If the evaluation fails.
    fn loss(&self, _trainer: &T) -> Result<Metrics> {
        Ok(Metrics::new())
    }

    /// Metrics of generated answers to held-out prompts, and what the user should know of them.
    ///
    /// # Errors
    /// If the evaluation fails.
    fn answers(&self, trainer: &T) -> Result<(Metrics, Option<String>)>;
}

/// A run and its folder.
pub struct Run {
    train: TrainArgs,
    /// The resolved configuration.
    config: String,
    base: BaseModel,
    reporter: Reporter,
    /// Holds the folder until the run is over.
    _claim: Claim,
}

impl Run {
    /// Begins a run in its claimed folder, or takes it up where its last checkpoint left it.
    ///
    /// # Errors
    /// If the checkpoint belongs to another run, the memory does not suffice, or the folder cannot be
    /// written.
    pub fn start<'a, C: TrainConfig>(
        config: &C,
        base: BaseModel,
        mut claim: Claim,
        trainer: &mut impl Trainer<'a>,
    ) -> Result<Self> {
        let mut before = None;
        if let Some((_, folder)) = &claim.checkpoint {
            trainer.learner_mut().resume(folder)?;
            trainer.resume_more(folder)?;
            before = Some(read_toml::<C>(&folder.join(CONFIG_FILE))?);
        }
        let plan = trainer.fit(before.as_ref().map(C::optim))?;
        let mut config = config.clone();
        plan.resolve(config.optim_mut());
        let (text, train) = (to_toml(&config)?, config.train().clone());
        claim.write_config(&text)?;
        let learner = trainer.learner();
        let mut reporter = Reporter::for_run(&train.output_dir, &learner.state().log_history)?;
        for warning in std::mem::take(&mut claim.warnings) {
            reporter.emit(Event::Warning(warning))?;
        }
        let (done_steps, total_steps) = (learner.state().global_step, learner.total_steps());
        reporter.emit(Event::RunStarted { name: train.name(), done_steps, total_steps })?;
        reporter.emit(Event::Planned(plan.to_string()))?;
        Ok(Run { train, config: text, base, reporter, _claim: claim })
    }

    /// Tells the user something.
    ///
    /// # Errors
    /// If a sink cannot take it.
    pub fn tell(&mut self, event: Event) -> Result<()> {
        self.reporter.emit(event)
    }

    /// Whether there is another step to make: not all are made, and none of them was the last by
    /// `early_stopping_patience`.
    pub fn goes_on<'a>(&self, trainer: &impl Trainer<'a>) -> bool {
        let (learner, patience) = (trainer.learner(), self.train.early_stopping_patience as u64);
        let impatient = patience > 0 && learner.state().evaluations_without_best >= patience;
        !learner.is_done() && !impatient
    }

    /// One optimizer step, made by `step`, with its metrics.
    ///
    /// # Errors
    /// If the step failed: what it worked on is kept in `dump-{step}` in the run's folder.
    pub fn step<'a, T: Trainer<'a>>(
        &mut self,
        trainer: &mut T,
        step: impl FnOnce(&mut T) -> Result<StepReport>,
    ) -> Result<StepReport> {
        let start = Instant::now();
        let number = trainer.learner().state().global_step + 1;
        let report = match step(trainer) {
            Ok(report) => report,
            Err(Error::Interrupted(reason)) => {
                return Err(self.interrupted(trainer, &format!("step {number}: {reason}")));
            }
            Err(error) => return Err(self.dump(trainer, number, error)),
        };
        let (step, seconds) = (report.step, start.elapsed().as_secs_f64());
        self.reporter.emit(Event::Step { step, tokens: report.tokens as u64, seconds })?;
        let learner = trainer.learner_mut();
        learner.state_mut().window.add(&report.metrics, seconds);
        let last = step == learner.total_steps();
        if last || step.is_multiple_of(self.train.logging_steps as u64) {
            self.log(learner)?;
        }
        Ok(report)
    }

    /// Whether the step that comes next writes a line of metrics.
    pub fn logs_next<'a>(&self, trainer: &impl Trainer<'a>) -> bool {
        let (step, all) =
            (trainer.learner().state().global_step + 1, trainer.learner().total_steps());
        step == all || step.is_multiple_of(self.train.logging_steps as u64)
    }

    /// Writes the line of metrics of the steps since the last one.
    fn log(&mut self, learner: &mut Learner) -> Result<()> {
        let state = learner.state_mut();
        let line = MetricLine::new(state.global_step, state.window.take());
        state.log_history.push(line.clone());
        self.reporter.emit(Event::Logged(line))
    }

    /// Whether there is an evaluation now: every `eval_steps` steps, and after the last one.
    pub fn evaluates_now<'a>(&self, trainer: &impl Trainer<'a>) -> bool {
        is_due(trainer.learner(), self.train.eval_steps)
    }

    /// Evaluates, notes the best value so far, and with `load_best_model_at_end` saves it.
    ///
    /// # Errors
    /// If a value is not a finite number, or a file cannot be written.
    pub fn evaluate<'a, T: Trainer<'a>>(
        &mut self,
        trainer: &mut T,
        held_out: &impl Evaluation<T>,
    ) -> Result<()> {
        let (train, learner) = (self.train.clone(), trainer.learner());
        let last = learner.state().global_step == learner.total_steps();
        let final_adapter = last && !train.load_best_model_at_end;
        let wanted = train.eval_accuracy == EvalAccuracy::Steps || final_adapter;
        let line = self.measure(trainer, held_out, (true, wanted))?;
        let Some(value) = line.metrics.get(metric_name(train.metric_for_best_model)) else {
            return Ok(());
        };
        let state = trainer.learner_mut().state_mut();
        match state.is_best(value, train.greater_is_better()) && train.load_best_model_at_end {
            true => self.save(trainer),
            false => Ok(()),
        }
    }

    /// Evaluates before the first step, unless the run that goes on here has done so.
    ///
    /// # Errors
    /// As [`Run::evaluate`].
    pub fn evaluate_before<'a, T: Trainer<'a>>(
        &mut self,
        trainer: &mut T,
        held_out: &impl Evaluation<T>,
    ) -> Result<()> {
        let state = trainer.learner().state();
        if state.global_step > 0 || !state.log_history.is_empty() {
            return Ok(());
        }
        self.measure(trainer, held_out, (true, true)).map(drop)
    }

    fn measure<'a, T: Trainer<'a>>(
        &mut self,
        trainer: &mut T,
        held_out: &impl Evaluation<T>,
        (loss, answers): (bool, bool),
    ) -> Result<MetricLine> {
        let mut metrics = if loss { held_out.loss(trainer)? } else { Metrics::new() };
        if answers && self.train.eval_accuracy != EvalAccuracy::No {
            let (answers, warning) = match held_out.answers(trainer) {
                Err(Error::Interrupted(reason)) => {
                    return Err(self.interrupted(trainer, &format!("evaluation: {reason}")));
                }
                answers => answers?,
            };
            answers.iter().for_each(|(name, value)| metrics.set(name, value));
            if let Some(warning) = warning {
                self.reporter.emit(Event::Warning(format!("evaluation: {warning}")))?;
            }
        }
        let state = trainer.learner_mut().state_mut();
        let step = state.global_step;
        if metrics.iter().next().is_none() {
            return Ok(MetricLine::new(step, metrics));
        }
        metrics.set("epoch", state.epoch);
        let line = MetricLine::new(step, metrics);
        state.log_history.push(line.clone());
        self.reporter.emit(Event::Evaluated(line.clone()))?;
        if let Some((name, value)) = line.metrics.iter().find(|(_, value)| !value.is_finite()) {
            let error = Error::failure(format!("step {step}: {name} became {value}"));
            return Err(self.dump(trainer, step, error));
        }
        Ok(line)
    }

    /// Whether there is a checkpoint now: every `save_steps` steps, and after the last one.
    pub fn saves_now<'a>(&self, trainer: &impl Trainer<'a>) -> bool {
        is_due(trainer.learner(), self.train.save_steps)
    }

    /// Saves a checkpoint of this step, unless there is one, and removes old ones.
    ///
    /// # Errors
    /// If it cannot be written whole.
    pub fn save<'a>(&mut self, trainer: &impl Trainer<'a>) -> Result<()> {
        let (train, state) = (&self.train, trainer.learner().state());
        let step = state.global_step;
        let path = checkpoint_dir(&train.output_dir, step);
        if path.exists() {
            return Ok(());
        }
        checkpoint::save(&train.output_dir, step, |folder| {
            write_atomic(&folder.join(CONFIG_FILE), self.config.as_bytes())?;
            trainer.learner().save(folder, &self.base)?;
            trainer.save_more(folder)
        })?;
        self.reporter.emit(Event::CheckpointSaved { step, path })?;
        let best = state.best_step.filter(|_| train.load_best_model_at_end);
        prune(&train.output_dir, train.save_total_limit, best)
    }

    /// Saves the last step, goes back to the best checkpoint if asked, and writes the adapter into
    /// the run's folder.
    ///
    /// # Errors
    /// If a file cannot be written whole, or the best checkpoint is damaged.
    pub fn finish<'a, T: Trainer<'a>>(
        &mut self,
        trainer: &mut T,
        held_out: &impl Evaluation<T>,
    ) -> Result<()> {
        if !trainer.learner().state().window.is_empty() {
            self.log(trainer.learner_mut())?;
        }
        self.save(trainer)?;
        let output_dir = self.train.output_dir.clone();
        let state = trainer.learner().state();
        let step = state.global_step;
        let best = state.best_step.filter(|_| self.train.load_best_model_at_end);
        if let Some(best) = best {
            let folder = checkpoint_dir(&output_dir, best);
            verify(&folder)?;
            trainer.learner_mut().restore_adapters(&folder)?;
        }
        crate::adapter::save(&output_dir, trainer.learner().adapters(), &self.base)?;
        let message = self.before_and_after(trainer, held_out, best.unwrap_or(step))?;
        let message = message + &format!("adapter: {}", output_dir.display());
        self.reporter.emit(Event::RunEnded { step, message })
    }

    /// What generated answers came to before training and with the final adapter, which is that of
    /// step `kept`; it is measured now unless its evaluation did so.
    fn before_and_after<'a, T: Trainer<'a>>(
        &mut self,
        trainer: &mut T,
        held_out: &impl Evaluation<T>,
        kept: u64,
    ) -> Result<String> {
        if self.train.eval_accuracy == EvalAccuracy::No {
            return Ok(String::new());
        }
        let history = &trainer.learner().state().log_history;
        let before = history.iter().find_map(|line| said_of_answers(&line.metrics));
        let of_kept = history.iter().rev().filter(|line| line.step == kept);
        let after = match of_kept.map(|line| &line.metrics).find_map(said_of_answers) {
            Some(after) => Some(after),
            None => said_of_answers(&self.measure(trainer, held_out, (false, true))?.metrics),
        };
        Ok(match before.zip(after) {
            Some(((what, before), (_, after))) => {
                format!("{what} before: {before}\n{what} after:  {after}\n")
            }
            None => String::new(),
        })
    }

    /// Saves the run for going on after what interrupted it, and says how.
    fn interrupted<'a>(&mut self, trainer: &impl Trainer<'a>, reason: &str) -> Error {
        let step = trainer.learner().state().global_step;
        let folder = checkpoint_dir(&self.train.output_dir, step);
        match self.save(trainer) {
            Ok(()) => Error::failure(format!(
                "{reason}; the run is saved in {}: mend the cause and go on with \
                 --resume_from_checkpoint latest",
                folder.display()
            )),
            Err(second) => Error::failure(format!("{reason}; it could not be saved: {second}")),
        }
    }

    /// Keeps what a failed step worked on, and says where.
    fn dump<'a>(&self, trainer: &impl Trainer<'a>, step: u64, error: Error) -> Error {
        let folder = self.train.output_dir.join(format!("dump-{step}"));
        let write = || -> Result<()> {
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            trainer.learner().save(&folder, &self.base)?;
            trainer.save_more(&folder)?;
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

/// Refuses evaluations that are to decide something without a row to evaluate on.
///
/// # Errors
/// Usage: names the key.
pub fn check_evaluations(run: &TrainArgs, rows: usize) -> Result<()> {
    let evaluates =
        run.eval_steps > 0 || run.load_best_model_at_end || run.early_stopping_patience > 0;
    match evaluates && rows == 0 {
        true => Err(Error::usage(
            "eval_steps is above 0 and no row is held out to evaluate on: set max_eval_samples above \
             0 to hold out rows of a file, name a split of the folder as dataset_test_split, or set \
             eval_steps = 0",
        )),
        false => Ok(()),
    }
}

/// What an evaluation's generated answers came to, and what that is called.
fn said_of_answers(metrics: &Metrics) -> Option<(&'static str, String)> {
    if let Some(tally) = Tally::read(metrics) {
        return Some(("accuracy", tally.to_string()));
    }
    let names = ["eval_reward", "eval_reward_low", "eval_reward_high"];
    let [reward, low, high] = names.map(|name| metrics.get(name));
    Some(("reward", format!("{:.3} [{:.3}, {:.3}]", reward?, low?, high?)))
}

fn metric_name(metric: BestMetric) -> &'static str {
    match metric {
        BestMetric::EvalLoss => "eval_loss",
        BestMetric::EvalMeanTokenAccuracy => "eval_mean_token_accuracy",
        BestMetric::EvalAccuracy => "eval_accuracy",
        BestMetric::EvalReward => "eval_reward",
    }
}

/// Whether something that comes every so many steps (0 = never), and at the end, comes now.
fn is_due(learner: &Learner, every: usize) -> bool {
    let step = learner.state().global_step;
    step == learner.total_steps() || (every > 0 && step.is_multiple_of(every as u64))
}
