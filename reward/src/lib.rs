//! Graders with typed outcomes.
