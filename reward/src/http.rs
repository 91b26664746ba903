//! Rewards of a server: a call is the body of a POST request, its answer the body of the response.

use std::io::ErrorKind;
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
    /// The address in messages.
    shown: String,
    port: u16,
    agent: Agent,
    requests: usize,
    timeout: Duration,
}

impl HttpReward {
    /// The reward at an address, called by the text behind `#`, else by the last part of its path, else by
    /// its host and port.
    ///
    /// # Errors
    /// If that is no address of a host.
    pub(crate) fn new(url: &str, options: &ParseOptions) -> Result<Self, String> {
        let shown = without_password(url);
        let wrong = |what: &str| {
            format!(
                "{shown} is no address: {what}; give one such as http://localhost:8000/my_reward"
            )
        };
        let uri: Uri = url.parse().map_err(|_| wrong("it cannot be read"))?;
        let host = uri.host().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| wrong("it names no host"))?;
        let place = uri.authority().map_or("", |all| all.as_str().rsplit('@').next().unwrap_or(""));
        if place.len() > host.len() && uri.port_u16().is_none() {
            return Err(wrong("its port is no number up to 65535"));
        }
        let last = uri.path().rsplit('/').find(|part| !part.is_empty());
        let own = url.split_once('#').map(|(_, name)| name).filter(|name| !name.is_empty());
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let config = Agent::config_builder()
            .timeout_global(Some(options.timeout))
            .http_status_as_error(false)
            .max_redirects(0);
        let config = match host == "localhost" || host.starts_with("127.") || host == "[::1]" {
            true => config.proxy(None),
            false => config,
        };
        Ok(HttpReward {
            name: own.or(last).unwrap_or(place).chars().map(plain).collect(),
            url: url.to_string(),
            shown,
            port: uri.port_u16().unwrap_or(if url.starts_with("https") { 443 } else { 80 }),
            agent: config.build().into(),
            requests: options.num_workers.max(1),
            timeout: options.timeout,
        })
    }

    /// One score a sample. A server that drops the connection is asked once more.
    fn ask(&self, samples: &[Sample]) -> Vec<Score> {
        let (body, n) = (request(samples).to_string(), samples.len());
        let answer = match self.post(&body) {
            Err(error) if is_dropped(&error) => self.post(&body),
            answer => answer,
        };
        match answer {
            Ok((200, body)) => scores(&body, n).unwrap_or_else(|reason| failed(&reason, n)),
            Ok((status, body)) => {
                let start: String = body.chars().take(300).collect();
                failed(&format!("{} answered with status {status}: {start:?}", self.shown), n)
            }
            Err(Error::Timeout(_)) => vec![Score::Timeout; n],
            Err(error) => {
                let reason =
                    format!("{} gave no answer: {error}; see what it said itself", self.shown);
                failed(&reason, n)
            }
        }
    }

    /// The status and the body of the response to a body.
    fn post(&self, body: &str) -> Result<(u16, String), Error> {
        let request = self.agent.post(&self.url).header("content-type", "application/json");
        let mut response = request.send(body)?;
        let bytes = response.body_mut().with_config().limit(MOST_BYTES).read_to_vec()?;
        Ok((response.status().as_u16(), String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// An address as messages have it: without the user and password that may stand before its host.
fn without_password(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let host = authority.rsplit('@').next().unwrap_or(authority);
    format!("{scheme}://{host}{path}")
}

/// Whether the connection was refused or broke.
fn is_dropped(error: &Error) -> bool {
    use ErrorKind::*;
    let kinds = [ConnectionRefused, ConnectionReset, ConnectionAborted, BrokenPipe, UnexpectedEof];
    match error {
        Error::Io(error) => kinds.contains(&error.kind()),
        Error::ConnectionFailed => true,
        _ => false,
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
                let seconds = self.timeout.as_secs_f64();
                Err(format!("{} did not answer within {seconds} s", self.shown))
            }
            Err(error) => Err(format!(
                "{} cannot be reached at port {}: {error}; start its server, or mend the address \
                 (https:// is for servers that speak TLS)",
                self.shown, self.port
            )),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_show_an_address_without_its_password() {
        for (url, shown) in [
            ("http://me:secret@host:80/a@b?c#d", "http://host:80/a@b?c#d"),
            ("https://me:se@cret@host", "https://host"),
            ("http://host/score", "http://host/score"),
            ("http://me:secret@", "http://"),
        ] {
            assert_eq!(without_password(url), shown);
        }
        let wrong = HttpReward::new("http://me:secret@host:80000/x", &ParseOptions::default());
        let said = wrong.err().unwrap();
        assert!(said.starts_with("http://host:80000/x is no address"), "{said}");
    }
}
