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
type Answer = dyn Fn(usize, Value) -> Option<(u16, Vec<u8>)> + Send + Sync;

/// A server on a free port: its address, and how many POST requests it has had.
fn serve(answer: Box<Answer>) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/my/reward-1", listener.local_addr().unwrap());
    let (answer, posts) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
    let counter = posts.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (answer, posts) = (answer.clone(), posts.clone());
            thread::spawn(move || reply(stream.unwrap(), &**answer, &posts));
        }
    });
    (address, counter)
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
        false => Some((405, b"only POST".to_vec())),
    };
    if let Some((status, text)) = answer {
        let length = text.len();
        let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close");
        let answer = [head.as_bytes(), b"\r\n\r\n", &text].concat();
        (&stream).write_all(&answer).unwrap();
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

/// Why a server's reward of two completions failed, which is the same for both, and how often it was asked.
fn reason(answer: Box<Answer>) -> (String, usize) {
    let (address, posts) = serve(answer);
    let judged = score(&mut set(&address, 1), &["x", "yy"]);
    assert_eq!(judged[0].scores, judged[1].scores);
    assert!(judged[0].reward.is_none());
    match &judged[0].scores[0] {
        Score::Error(reason) => (reason.clone(), posts.load(Ordering::SeqCst)),
        other => panic!("{other:?}"),
    }
}

/// The answer to a call: its completions' lengths, null for an empty one.
fn lengths(body: &Value) -> (u16, Vec<u8>) {
    let length = |text: &Value| match text.as_str().unwrap().len() {
        0 => Value::Null,
        n => json!(n),
    };
    let all: Vec<Value> = body["completions"].as_array().unwrap().iter().map(length).collect();
    (200, json!({ "rewards": all }).to_string().into_bytes())
}

#[test]
fn a_server_gets_the_columns_and_its_rewards_come_in_order_from_several_requests() {
    for (num_workers, requests) in [(1, 1), (2, 2), (4, 3), (9, 5)] {
        let (address, posts) = serve(Box::new(|_, body| {
            assert_eq!(body["completion_ids"][0], json!([7, 8]));
            assert_eq!((&body["answer"][0], &body["prompts"][0]), (&json!("a"), &json!("p")));
            Some(lengths(&body))
        }));
        let mut set = set(&address, num_workers);
        assert_eq!(set.names(), ["reward_1"]);
        set.start().unwrap();
        for call in 1..3 {
            let judged = score(&mut set, &["a", "bb", "", "dddd", "e"]);
            let rewards: Vec<_> = judged.iter().map(|judged| judged.reward).collect();
            assert_eq!(rewards, [Some(1.0), Some(2.0), None, Some(4.0), Some(1.0)]);
            assert_eq!(posts.load(Ordering::SeqCst), call * requests);
        }
    }
}

#[test]
fn a_dropped_connection_is_tried_once_more() {
    let (address, _) = serve(Box::new(|n, body| (n > 0).then(|| lengths(&body))));
    assert_eq!(score(&mut set(&address, 1), &["abc"])[0].reward, Some(3.0));
    let (said, posts) = reason(Box::new(|_, _| None));
    assert!(said.contains(" gave no answer: ") && posts == 2, "{said} {posts}");
}

#[test]
fn nonsense_is_counted_with_its_reason_and_not_asked_for_again() {
    let of = |status: u16, text: &[u8]| {
        let text = text.to_vec();
        let (said, posts) = reason(Box::new(move |_, _| Some((status, text.clone()))));
        assert_eq!(posts, 1, "{said}");
        said
    };
    let said = of(500, b"Internal Server Error");
    assert!(said.ends_with("answered with status 500: \"Internal Server Error\""), "{said}");
    let moved = of(302, b"");
    assert!(moved.ends_with("answered with status 302: \"\""), "{moved}");
    let html = of(200, b"<html>");
    assert_eq!(html, "it answered \"<html>\", which is not {\"rewards\": [...]}");
    assert!(of(200, b"\xff\xfe").contains("which is not {\"rewards\": [...]}"));
    assert_eq!(of(200, b"{\"rewards\": [1]}"), "it gave 1 reward for 2 completions");
}

#[test]
fn a_server_that_hangs_times_out() {
    let (address, posts) = serve(Box::new(|_, _| {
        thread::sleep(Duration::from_secs(5));
        None
    }));
    let judged = score(&mut set(&address, 1), &["x"]);
    assert_eq!((&judged[0].scores[..], posts.load(Ordering::SeqCst)), (&[Score::Timeout][..], 1));
}

#[test]
fn a_server_that_is_not_there_shows_before_the_run() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = set(&format!("http://127.0.0.1:{port}"), 1).start().unwrap_err();
    assert!(error.contains(&format!("cannot be reached at port {port}")), "{error}");
    for bare in ["localhost:8000/my_reward", "http:/localhost/x"] {
        let error = parse(bare, &ParseOptions::default()).err().unwrap();
        assert!(error.contains("begins with http://"), "{error}");
    }
    for wrong in ["http://", "https:///x", "http://a b/", "http://localhost:80000/x", "http://a:/x"]
    {
        let error = parse(wrong, &ParseOptions::default()).err().unwrap();
        assert!(error.starts_with(&format!("{wrong} is no address")), "{error}");
    }
}

#[test]
fn a_server_has_the_name_that_its_address_gives() {
    for (address, name) in [
        ("http://localhost:8000", "localhost_8000"),
        ("https://user:pass@a.b/", "a_b"),
        ("http://a/my/score?x=1", "score"),
        ("http://a/score#second", "second"),
    ] {
        assert_eq!(set(address, 1).names(), [name]);
    }
    let both = ["http://a/score", "http://b/score"];
    let rewards = both.map(|text| parse(text, &ParseOptions::default()).unwrap());
    let error = RewardSet::new(rewards.into(), Vec::new()).err().unwrap();
    assert!(error.starts_with("two rewards are called score"), "{error}");
}
