//! Graders with typed outcomes: what a completion comes to, compared with the gold answer.
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

mod digit;
mod exact;
mod format;
mod grade;
mod length;
mod letter;
mod number;
mod numeric;
mod outcome;
mod place;
mod ratio;
mod repetition;
mod reward;
pub use reward::{Judged, ParseOptions, Reward, RewardSet, Sample, Score, parse};
mod tidy;

pub use format::{is_think_format, tag_share};
pub use grade::{BadGold, GoldError, check_gold, grade};
pub use length::{CosineLength, soft_overlong};
pub use letter::final_letter;
pub use number::Number;
pub use numeric::final_number;
pub use outcome::Outcome;
pub use repetition::repetition;
