//! Turns of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::example::message;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Message { role: role.to_string(), content: content.into() }
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// `{"role": ..., "content": ...}`, as chat templates take it.
    pub fn to_json(&self) -> Value {
        message(&self.role, &self.content)
    }
}
