//! Rewards of completions, and graders with typed outcomes.
//!
//! A [`Reward`] scores completions; [`parse`] makes one of what a user writes: a built-in name, a
//! Python file, a command, the address of a server. A [`RewardSet`] puts several together and hides no failure: what cannot be
//! scored is left out and says why.
//!
//! [`grade`] never panics, never hangs and never turns a failure into a score of 0 unseen: a
//! completion without an answer is [`Outcome::Unparsable`], and [`check_gold`] shows before any
//! training that a task's own answers grade right.
//!
//! ```
//! use datasets::Grader;
//! use reward::{Outcome, grade};
//!
//! assert_eq!(grade(Grader::Numeric, r"So she pays \boxed{\$1,250}.", "1250"), Outcome::Right);
//! assert_eq!(grade(Grader::Letter, "The answer is (B).", "C"), Outcome::Wrong);
//! assert_eq!(grade(Grader::Digit, "I do not know", "7"), Outcome::Unparsable);
//! ```

mod builtin;
mod digit;
mod exact;
mod format;
mod grade;
mod http;
mod length;
mod letter;
mod number;
mod numeric;
mod outcome;
mod parse;
mod place;
mod process;
mod python;
mod ratio;
mod repetition;
mod reward;
mod set;
mod spec;
mod tidy;
mod wire;
mod worker;

pub use format::{is_think_format, tag_share};
pub use grade::{BadGold, GoldError, check_gold, grade};
pub use length::{CosineLength, soft_overlong};
pub use letter::final_letter;
pub use number::Number;
pub use numeric::final_number;
pub use outcome::Outcome;
pub use parse::{ParseOptions, parse};
pub use repetition::repetition;
pub use reward::{Reward, Sample, Score};
pub use set::{Judged, RewardSet};
