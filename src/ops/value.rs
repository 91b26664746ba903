//! Values of a forward pass, and what its backward pass keeps of them.

use std::cell::{Cell, OnceCell};
use std::fmt;
use std::rc::Rc;

use candle_core::Tensor;

use crate::{Error, Result};

/// A value's place on its tape; a constant has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub(super) Option<usize>);

/// A tensor and its place on the tape.
#[derive(Clone, Debug)]
pub struct Value {
    tensor: Tensor,
    place: Place,
    again: Option<Rc<Again>>,
}

impl Value {
    /// A value that gradients do not reach.
    pub fn constant(tensor: Tensor) -> Self {
        Value { tensor, place: Place(None), again: None }
    }

    pub(super) fn at(tensor: Tensor, node: usize, again: Option<Rc<Again>>) -> Self {
        Value { tensor, place: Place(Some(node)), again }
    }

    /// The tensor itself.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Its place on the tape.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Whether a gradient will be computed for it.
    pub fn is_tracked(&self) -> bool {
        self.place.0.is_some()
    }

    /// What the backward pass keeps of it.
    pub fn keep(&self) -> Kept {
        match &self.again {
            Some(again) => Kept::Again(again.clone()),
            None => Kept::Tensor(self.tensor.clone()),
        }
    }

    /// Whether [`Value::keep`] keeps no tensor of its own.
    pub fn is_cheap(&self) -> bool {
        self.again.is_some()
    }

    pub(super) fn again(&self) -> Option<Rc<Again>> {
        self.again.clone()
    }
}

/// A value kept for the backward pass: its tensor, or how to make it again where that is cheap next
/// to a product with a frozen matrix.
#[derive(Clone, Debug)]
pub enum Kept {
    /// The tensor.
    Tensor(Tensor),
    /// How to make it from other kept values.
    Again(Rc<Again>),
}

impl Kept {
    /// The tensor. One that is made again lives from the first call until nobody keeps the value.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Kept::Tensor(tensor) => Ok(tensor.clone()),
            Kept::Again(again) => again.tensor(),
        }
    }
}

/// How a tensor is made again, and the tensor once that has happened.
pub struct Again {
    make: Cell<Option<Make>>,
    made: OnceCell<Tensor>,
}

type Make = Box<dyn FnOnce() -> Result<Tensor>>;

impl Again {
    pub(super) fn new(make: impl FnOnce() -> Result<Tensor> + 'static) -> Self {
        Again { make: Cell::new(Some(Box::new(make))), made: OnceCell::new() }
    }

    fn tensor(&self) -> Result<Tensor> {
        if let Some(make) = self.make.take() {
            let tensor = make()?;
            return Ok(self.made.get_or_init(|| tensor).clone());
        }
        let made = self.made.get().cloned();
        made.ok_or_else(|| Error::failure("a value of the forward pass could not be made again"))
    }
}

impl fmt::Debug for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Again").field("made", &self.made).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_value_is_made_again_once_and_freed_with_its_last_keeper() {
        let calls = Rc::new(Cell::new(0));
        let counted = calls.clone();
        let again = Again::new(move || {
            counted.set(counted.get() + 1);
            Ok(Tensor::new(&[7f32], &Device::Cpu)?)
        });
        let first = Kept::Again(Rc::new(again));
        let second = first.clone();
        for kept in [&first, &second, &first] {
            assert_eq!(kept.tensor().unwrap().to_vec1::<f32>().unwrap(), [7.0]);
        }
        assert_eq!(calls.get(), 1);
        drop((first, second));
        assert_eq!(Rc::strong_count(&calls), 1);
    }

    #[test]
    fn a_value_that_cannot_be_made_again_is_an_error_every_time() {
        let kept = Kept::Again(Rc::new(Again::new(|| Err(Error::failure("gone")))));
        assert_eq!(kept.tensor().unwrap_err().to_string(), "gone");
        assert!(kept.tensor().unwrap_err().to_string().contains("made again"));
    }
}
