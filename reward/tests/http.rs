//! Rewards of a server that is right, silent, gone, or talks nonsense: nothing is hidden, nothing lost.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use datasets::{Prompt, Row};
use reward::{Judged, ParseOptions, RewardSet, Sample, Score, parse};
use serde_json::{Value, json};

/// What a server does with the body of its n-th request, counted from 0: an answer with its status, or the
/// end of the connection.
type Answer = dyn Fn(usize, Value) -> Option<(u16, String)> + Send + Sync;

/// A server on a free port: its address.
fn serve(answer: Box<Answer>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/my/reward-1", listener.local_addr().unwrap());
    let (answer, posts) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (answer, posts) = (answer.clone(), posts.clone());
            thread::spawn(move || reply(stream.unwrap(), &**answer, &posts));
        }
    });
    address
}

/// Answers one request.
fn reply(stream: TcpStream, answer: &Answer, posts: &AtomicUsize) {
    let mut reader = BufReader::new(&stream);
    let (mut line, mut length, mut posted) = (String::new(), 0, false);
    while reader.read_line(&mut line).unwrap_or(0) > 2 {
        let lower = line.to_lowercase();
        posted |= lower.starts_with("post ");
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let answer = match posted {
        true => {
            answer(posts.fetch_add(1, Ordering::SeqCst), serde_json::from_slice(&body).unwrap())
        }
        false => Some((405, "only POST".to_string())),
    };
    if let Some((status, text)) = answer {
        let length = text.len();
        let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close");
        (&stream).write_all(format!("{head}\r\n\r\n{text}").as_bytes()).unwrap();
    }
}

fn set(address: &str, num_workers: usize) -> RewardSet {
    let timeout = Duration::from_secs(1);
    let options = ParseOptions { timeout, num_workers, ..ParseOptions::default() };
    RewardSet::new(vec![parse(address, &options).unwrap()], Vec::new()).unwrap()
}

fn score(set: &mut RewardSet, completions: &[&str]) -> Vec<Judged> {
    let (prompt, ids) = (Prompt::Text("p".into()), [7, 8]);
    let columns: Row = [("answer".to_string(), json!("a"))].into_iter().collect();
    let sample = |completion| Sample {
        prompt: &prompt,
        completion,
        completion_ids: &ids,
        columns: &columns,
    };
    let samples: Vec<Sample> = completions.iter().map(|completion| sample(*completion)).collect();
    set.score(&samples)
}

/// Why a server's reward of two completions failed, which is the same for both.
fn reason(answer: Box<Answer>) -> String {
    let judged = score(&mut set(&serve(answer), 1), &["x", "yy"]);
    assert_eq!(judged[0].scores, judged[1].scores);
    assert!(judged[0].reward.is_none());
    match &judged[0].scores[0] {
        Score::Error(reason) => reason.clone(),
        other => panic!("{other:?}"),
    }
}

/// The rewards of a call: its completions' lengths, none for an empty one.
fn lengths(body: &Value) -> Value {
    let length = |text: &Value| match text.as_str().unwrap().len() {
        0 => Value::Null,
        n => json!(n),
    };
    json!({"rewards": body["completions"].as_array().unwrap().iter().map(length).collect::<Vec<_>>()})
}

#[test]
fn a_server_gets_the_columns_and_its_rewards_come_in_order_from_several_requests() {
    for num_workers in [1, 2, 5] {
        let address = serve(Box::new(|_, body| {
            assert_eq!(body["completion_ids"][0], json!([7, 8]));
            assert_eq!((&body["answer"][0], &body["prompts"][0]), (&json!("a"), &json!("p")));
            Some((200, lengths(&body).to_string()))
        }));
        let mut set = set(&address, num_workers);
        assert_eq!(set.names(), ["reward-1"]);
        set.start().unwrap();
        for _ in 0..2 {
            let judged = score(&mut set, &["a", "bb", "", "dddd", "e"]);
            let rewards: Vec<_> = judged.iter().map(|judged| judged.reward).collect();
            assert_eq!(rewards, [Some(1.0), Some(2.0), None, Some(4.0), Some(1.0)]);
        }
    }
}

#[test]
fn a_dropped_connection_is_tried_once_more() {
    let address = serve(Box::new(|n, body| (n > 0).then(|| (200, lengths(&body).to_string()))));
    assert_eq!(score(&mut set(&address, 1), &["abc"])[0].reward, Some(3.0));
    assert!(reason(Box::new(|_, _| None)).contains("cannot be reached"));
}

#[test]
fn nonsense_is_counted_with_its_reason() {
    let said = reason(Box::new(|_, _| Some((500, "Internal Server Error".into()))));
    assert!(said.ends_with("answered with status 500: \"Internal Server Error\""), "{said}");
    let said = reason(Box::new(|_, _| Some((200, "<html>".into()))));
    assert_eq!(said, "it answered \"<html>\", which is not {\"rewards\": [...]}");
    let said = reason(Box::new(|_, _| Some((200, r#"{"rewards": [1]}"#.into()))));
    assert_eq!(said, "it gave 1 reward for 2 completions");
}

#[test]
fn a_server_that_hangs_times_out() {
    let address = serve(Box::new(|_, _| {
        thread::sleep(Duration::from_secs(5));
        None
    }));
    let judged = score(&mut set(&address, 1), &["x"]);
    assert_eq!(judged[0].scores, [Score::Timeout]);
}

#[test]
fn a_server_that_is_not_there_shows_before_the_run() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("http://127.0.0.1:{port}");
    let mut gone = set(&address, 1);
    assert_eq!(gone.names(), ["127.0.0.1"]);
    assert!(gone.start().unwrap_err().contains("cannot be reached"));
    for wrong in ["http://", "https:///x", "http://a b/"] {
        let error = parse(wrong, &ParseOptions::default()).err().unwrap();
        assert!(error.starts_with(&format!("{wrong} is no address")), "{error}");
    }
}
