//! Reverse-mode differentiation for a frozen base.
//!
//! A [`Tape`] records one pullback per operation: a closure that turns the gradient of the result
//! into gradients of the inputs. Unlike a graph of tensors it keeps exactly what each pullback
//! captured, knows no gradient of a frozen weight, frees activations while it runs backwards, and
//! takes any number of inputs. Values that depend on no parameter are not recorded, so the backward
//! pass ends at the lowest layer that has an adapter.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Engine;
use crate::Result;

/// Gradients by parameter key, each of its parameter's shape.
pub type Gradients = BTreeMap<String, Tensor>;

type Pullback = Box<dyn FnOnce(Tensor, &mut Sink) -> Result<()>>;

/// A tensor and its place on the tape; a constant has none.
#[derive(Clone, Debug)]
pub struct Value {
    tensor: Tensor,
    node: Option<usize>,
}

impl Value {
    /// A value that gradients do not reach.
    pub fn constant(tensor: Tensor) -> Self {
        Value { tensor, node: None }
    }

    /// The tensor itself.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient will be computed for it.
    pub fn is_tracked(&self) -> bool {
        self.node.is_some()
    }
}

enum Node {
    /// A trainable parameter.
    Param(String),
    /// An input whose gradient the caller wants back.
    Input,
    /// The result of an operation.
    Op { inputs: Vec<Option<usize>>, pullback: Pullback },
}

/// Where a pullback puts its results.
pub struct Sink<'a> {
    engine: &'a Engine,
    inputs: &'a [Option<usize>],
    slots: &'a mut [Option<Tensor>],
}

impl Sink<'_> {
    /// Whether input `i` of the operation needs a gradient.
    pub fn wants(&self, i: usize) -> bool {
        self.inputs[i].is_some()
    }

    /// Adds `gradient` to that of input `i`; ignored if nobody asked for it.
    pub fn give(&mut self, i: usize, gradient: Tensor) -> Result<()> {
        let Some(node) = self.inputs[i] else { return Ok(()) };
        let sum = match self.slots[node].take() {
            None => gradient,
            Some(before) => self.engine.add(&before, &gradient)?,
        };
        self.slots[node] = Some(sum);
        Ok(())
    }
}

/// The record of one forward pass.
pub struct Tape {
    engine: Engine,
    recording: bool,
    nodes: RefCell<Vec<Node>>,
}

impl Tape {
    /// A tape that records, for training.
    pub fn recording(engine: &Engine) -> Self {
        Self::new(engine, true)
    }

    /// A tape that records nothing, for inference.
    pub fn off(engine: &Engine) -> Self {
        Self::new(engine, false)
    }

    fn new(engine: &Engine, recording: bool) -> Self {
        Tape { engine: engine.clone(), recording, nodes: RefCell::new(Vec::new()) }
    }

    /// The engine that operations on this tape run on.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Whether operations are recorded.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A trainable parameter; its gradient comes back under `key`.
    pub fn param(&self, key: &str, tensor: &Tensor) -> Value {
        self.leaf(tensor, || Node::Param(key.to_string()))
    }

    /// An input whose gradient is wanted from [`Tape::backward`].
    pub fn input(&self, tensor: &Tensor) -> Value {
        self.leaf(tensor, || Node::Input)
    }

    fn leaf(&self, tensor: &Tensor, node: impl FnOnce() -> Node) -> Value {
        let tensor = tensor.clone();
        if !self.recording {
            return Value::constant(tensor);
        }
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(node());
        Value { tensor, node: Some(nodes.len() - 1) }
    }

    /// Records the result of an operation; `pullback` gets the gradient of `result` and a [`Sink`]
    /// whose inputs are numbered as in `inputs`. `make` runs only if somebody wants a gradient.
    pub fn push<F>(&self, result: Tensor, inputs: &[&Value], make: impl FnOnce() -> F) -> Value
    where
        F: FnOnce(Tensor, &mut Sink) -> Result<()> + 'static,
    {
        if !self.recording || inputs.iter().all(|input| input.node.is_none()) {
            return Value::constant(result);
        }
        let pullback = Box::new(make());
        let inputs = inputs.iter().map(|input| input.node).collect();
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(Node::Op { inputs, pullback });
        Value { tensor: result, node: Some(nodes.len() - 1) }
    }

    /// Gradients of all parameters that `root` depends on, given d(loss)/d(root).
    ///
    /// Consumes the record; activations are freed as the pass goes down.
    pub fn backward(self, root: &Value, gradient: Tensor) -> Result<Gradients> {
        Ok(self.pull(root, gradient, None)?.1)
    }

    /// Like [`Tape::backward`], and also the gradient of one input made by [`Tape::input`].
    pub fn backward_to_input(
        self,
        root: &Value,
        gradient: Tensor,
        input: &Value,
    ) -> Result<(Option<Tensor>, Gradients)> {
        self.pull(root, gradient, input.node)
    }

    fn pull(
        self,
        root: &Value,
        gradient: Tensor,
        input: Option<usize>,
    ) -> Result<(Option<Tensor>, Gradients)> {
        let mut params = Gradients::new();
        let Some(top) = root.node else { return Ok((None, params)) };
        let mut nodes = self.nodes.into_inner();
        nodes.truncate(top + 1);
        let mut slots: Vec<Option<Tensor>> = vec![None; nodes.len()];
        slots[top] = Some(gradient);
        while let Some(node) = nodes.pop() {
            if Some(nodes.len()) == input {
                continue;
            }
            let Some(gradient) = slots[nodes.len()].take() else { continue };
            let (engine, slots) = (&self.engine, slots.as_mut_slice());
            match node {
                Node::Input => {}
                Node::Param(key) => accumulate(engine, &mut params, key, gradient)?,
                Node::Op { inputs, pullback } => {
                    let mut sink = Sink { engine, inputs: &inputs, slots };
                    pullback(gradient, &mut sink)?;
                }
            }
        }
        Ok((input.and_then(|node| slots[node].take()), params))
    }
}

/// Adds `gradient` to the sum kept under `key`.
pub fn accumulate(
    engine: &Engine,
    sums: &mut Gradients,
    key: String,
    gradient: Tensor,
) -> Result<()> {
    let sum = match sums.get(&key) {
        None => gradient,
        Some(before) => engine.add(before, &gradient)?,
    };
    sums.insert(key, sum);
    Ok(())
}
