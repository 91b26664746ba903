//! Rewards of a server: a call is the body of a POST request, its answer the body of the response.

use std::thread;
use std::time::Duration;

use ureq::http::Uri;
use ureq::{Agent, Error};

use crate::parse::ParseOptions;
use crate::reward::{Reward, Sample, Score};
use crate::wire::{failed, request, scores};

/// The longest answer that is read.
const MOST_BYTES: u64 = 64 << 20;

/// A reward that a server computes; samples are split among as many requests at once as there are workers.
pub(crate) struct HttpReward {
    name: String,
    url: String,
    agent: Agent,
    requests: usize,
    timeout: Duration,
}

impl HttpReward {
    /// The reward at an address, called by the last part of its path, or without one by its host.
    ///
    /// # Errors
    /// If that is no address of a host.
    pub(crate) fn new(url: &str, options: &ParseOptions) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|error| format!("{url} is no address: {error}"))?;
        let host = uri.host().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| format!("{url} is no address: it names no host"))?;
        let last = uri.path().rsplit('/').find(|part| !part.is_empty());
        let plain = |c: char| if c.is_alphanumeric() || "_-.".contains(c) { c } else { '_' };
        let config = Agent::config_builder()
            .timeout_global(Some(options.timeout))
            .http_status_as_error(false);
        Ok(HttpReward {
            name: last.unwrap_or(host).chars().map(plain).collect(),
            url: url.to_string(),
            agent: config.build().into(),
            requests: options.num_workers.max(1),
            timeout: options.timeout,
        })
    }

    /// One score a sample. A server that drops the connection is asked once more.
    fn ask(&self, samples: &[Sample]) -> Vec<Score> {
        let (body, n) = (request(samples).to_string(), samples.len());
        let answer = match self.post(&body) {
            Err(Error::Io(_) | Error::ConnectionFailed | Error::Protocol(_)) => self.post(&body),
            answer => answer,
        };
        match answer {
            Ok((200, body)) => scores(&body, n).unwrap_or_else(|reason| failed(&reason, n)),
            Ok((status, body)) => {
                let start: String = body.chars().take(80).collect();
                failed(&format!("{} answered with status {status}: {start:?}", self.url), n)
            }
            Err(Error::Timeout(_)) => vec![Score::Timeout; n],
            Err(error) => failed(&self.reason(&error), n),
        }
    }

    /// The status and the body of the response to a body.
    fn post(&self, body: &str) -> Result<(u16, String), Error> {
        let request = self.agent.post(&self.url).header("content-type", "application/json");
        let mut response = request.send(body)?;
        let text = response.body_mut().with_config().limit(MOST_BYTES).read_to_string()?;
        Ok((response.status().as_u16(), text))
    }

    fn reason(&self, error: &Error) -> String {
        format!("{} cannot be reached: {error}", self.url)
    }
}

impl Reward for HttpReward {
    fn name(&self) -> &str {
        &self.name
    }

    /// Asks for the address with GET: any answer shows that somebody listens.
    fn start(&mut self) -> Result<(), String> {
        match self.agent.get(&self.url).call() {
            Ok(_) => Ok(()),
            Err(Error::Timeout(_)) => {
                Err(format!("{} did not answer within {:?}", self.url, self.timeout))
            }
            Err(error) => Err(self.reason(&error)),
        }
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Score> {
        let this = &*self;
        thread::scope(|scope| {
            let each = samples.len().div_ceil(this.requests).max(1);
            let calls: Vec<_> = samples
                .chunks(each)
                .map(|part| (part.len(), scope.spawn(move || this.ask(part))))
                .collect();
            let joined = calls.into_iter().map(|(n, call)| {
                call.join().unwrap_or_else(|_| failed("the call to it panicked", n))
            });
            joined.flatten().collect()
        })
    }
}
