//! `steer generate`: answers one prompt, or chats on a terminal.

use std::cell::RefCell;
use std::io::{BufRead, IsTerminal};
use std::path::Path;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use steersman::adapter::{Adapter, load_all, warn_of_other_model};
use steersman::config::{ModelArgs, ProfileArgs, Repeated, RunConfig};
use steersman::model::{LoadedModel, TextModel};
use steersman::rollout::{
    GenerateOptions, Generator, Progress, Request, SamplingParams, StopReason,
};
use steersman::{Error, Result, cli};

/// Flags of `steer generate`.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[command(rename_all = "snake_case")]
#[serde(default)]
pub struct GenerateArgs {
    #[command(flatten)]
    #[serde(flatten)]
    model: ModelArgs,
    /// Adapter folder, ours or PEFT's LoRA; may be given several times
    adapter: Repeated,
    /// What to answer; without it a chat is opened
    prompt: Option<String>,
    /// System message of the conversation
    system_prompt: Option<String>,
    /// Continue the prompt as plain text, without the chat template
    raw: bool,
    /// At most this many new tokens
    max_new_tokens: usize,
    /// Divides the logits; 0 = greedy
    temperature: f64,
    /// Sample from the k most likely tokens; 0 = off
    top_k: usize,
    /// Sample from the most likely tokens that reach this probability; 1 = off
    top_p: f64,
    /// Sample from tokens at least this fraction as likely as the best; 0 = off
    min_p: f64,
    /// Penalty on tokens already seen; 1 = off
    repetition_penalty: f64,
    /// End the answer before this text; may be given several times
    stop: Repeated,
    /// Seed of the samples
    seed: u64,
    #[command(flatten)]
    #[serde(flatten)]
    profile: ProfileArgs,
}

/// A model that is ready to answer.
struct Session<'a> {
    args: &'a GenerateArgs,
    model: LoadedModel,
    text: TextModel,
    adapters: Vec<Box<dyn Adapter>>,
    options: GenerateOptions,
}

impl Default for GenerateArgs {
    fn default() -> Self {
        GenerateArgs {
            model: ModelArgs::default(),
            adapter: Repeated::default(),
            prompt: None,
            system_prompt: None,
            raw: false,
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Repeated::default(),
            seed: 0,
            profile: ProfileArgs::default(),
        }
    }
}

impl GenerateArgs {
    fn sampling(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}

impl RunConfig for GenerateArgs {
    const COMMAND: &'static str = "steer generate";
    const ABOUT: &'static str = "Answers one prompt, or chats on a terminal";

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.sampling().validate()?;
        if self.max_new_tokens == 0 {
            return Err(Error::usage("max_new_tokens must be at least 1"));
        }
        match self.raw && self.prompt.is_none() {
            true => Err(Error::usage("--raw wants a --prompt")),
            false => Ok(()),
        }
    }

    fn profile(&self) -> Option<&Path> {
        self.profile.path()
    }
}

/// Runs the command.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let engine = args.model.engine()?;
    let model = LoadedModel::load(&args.model.model_name_or_path, args.model.storage(), &engine)?;
    let template: Option<&Path> = args.model.chat_template_path.as_deref();
    let text = TextModel::load(&model.source, template, model.policy.config().vocab_size)?;
    let adapters = load_all(&args.adapter.0, model.policy.config(), engine.device())?;
    warn_of_other_model(&args.adapter.0, || model.base())?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampling: args.sampling(),
        eos_token_ids: text.stop_token_ids.clone(),
        seed: args.seed,
        ..Default::default()
    };
    let _rounded = args.prompt.is_none().then(|| model.policy.keep_rounded());
    let session = Session { args, model, text, adapters, options };
    match &args.prompt {
        Some(prompt) if args.raw => session.answer(&session.encode(prompt, true)?, 0).map(drop),
        Some(prompt) => {
            let ids = session.chat_prompt(&session.opening(prompt))?;
            session.answer(&ids, 0).map(drop)
        }
        None => session.chat(),
    }
}

impl Session<'_> {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.text.tokenizer.encode(text, special)
    }

    fn chat_prompt(&self, messages: &[Value]) -> Result<Vec<u32>> {
        self.text.template().map_err(|e| Error::usage(format!("{e}, or give --raw")))?;
        self.text.chat_prompt(messages)
    }

    fn opening(&self, prompt: &str) -> Vec<Value> {
        let system = self.args.system_prompt.iter();
        let mut messages: Vec<_> =
            system.map(|system| json!({"role": "system", "content": system})).collect();
        messages.push(json!({"role": "user", "content": prompt}));
        messages
    }

    /// Prints the answer as it grows and returns it.
    fn answer(&self, prompt: &[u32], turn: u64) -> Result<String> {
        let stream = RefCell::new(self.text.tokenizer.decode_stream(true));
        let printed = RefCell::new(String::new());
        let failure = RefCell::new(None);
        let wants_stop = !self.args.stop.0.is_empty();
        let stopped = |tokens: &[u32]| {
            if failure.borrow().is_some() || !wants_stop {
                return failure.borrow().is_some();
            }
            let text = self.text.tokenizer.decode(tokens, true).unwrap_or_default();
            self.args.stop.0.iter().any(|stop| text.contains(stop.as_str()))
        };
        let (policy, options) = (&self.model.policy, &self.options);
        let generator = Generator::new(policy, &self.adapters, options, Some(&stopped));
        let request = Request { prompt: prompt.to_vec(), prompt_id: turn, sample: 0 };
        let completions = generator.stream(&[request], &mut |event| {
            let Progress::Token(_, token) = event else { return };
            match stream.borrow_mut().step(token) {
                Ok(piece) if wants_stop => printed.borrow_mut().push_str(&piece),
                Ok(piece) => {
                    printed.borrow_mut().push_str(&piece);
                    if let Err(error) = cli::print(&piece) {
                        failure.replace(Some(error));
                    }
                }
                Err(error) => drop(failure.replace(Some(error))),
            }
        })?;
        if let Some(error) = failure.take() {
            return Err(error);
        }
        let rest = stream.into_inner().finish()?;
        let mut text = printed.into_inner() + &rest;
        if completions.iter().any(|completion| completion.stop == StopReason::StopString) {
            let end = self.args.stop.0.iter().filter_map(|stop| text.find(stop.as_str())).min();
            text.truncate(end.unwrap_or(text.len()));
        }
        let unprinted = if wants_stop { &text } else { &rest };
        cli::print(&format!("{unprinted}\n"))?;
        Ok(text)
    }

    fn chat(&self) -> Result<()> {
        let terminal = std::io::stdin().is_terminal();
        let mut messages: Vec<Value> = Vec::new();
        let mut turn = 0;
        loop {
            if terminal {
                cli::print("> ")?;
            }
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line);
            if read.map_err(Error::io("standard input"))? == 0 {
                return Ok(());
            }
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            match messages.is_empty() {
                true => messages = self.opening(line),
                false => messages.push(json!({"role": "user", "content": line})),
            }
            let answer = self.answer(&self.chat_prompt(&messages)?, turn)?;
            messages.push(json!({"role": "assistant", "content": answer}));
            turn += 1;
        }
    }
}
