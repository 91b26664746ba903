//! Reverse-mode differentiation for a frozen base.
//!
//! A [`Tape`] records one pullback per operation: a closure that turns the gradient of the result
//! into gradients of the inputs. Unlike a graph of tensors it keeps exactly what each pullback
//! captured, knows no gradient of a frozen weight, frees activations while it runs backwards, and
//! takes any number of inputs. Values that depend on no parameter are not recorded, so the backward
//! pass ends at the lowest layer that has an adapter. Results that are cheap to compute again say
//! how, and then nobody keeps them (`value.rs`), but on tapes that [keep all](Tape::keeping_all).

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{Shape, Tensor};
use tracing::trace_span;

use super::Engine;
use super::engine::host;
use super::sums::{GradientSums, Gradients, Layout};
use super::value::{Again, Place, Value};
use crate::Result;
use crate::kernels::row_sum::RowSum;
use crate::kernels::slices;

type Pullback = Box<dyn FnOnce(Tensor, &mut Sink) -> Result<()>>;

enum Node {
    /// A trainable parameter.
    Param(String),
    /// An input whose gradient the caller wants back.
    Input,
    /// The result of an operation.
    Op { inputs: Vec<Place>, pullback: Pullback },
}

/// A gradient while it is summed.
enum Slot {
    /// A tensor that others may hold too.
    Shared(Tensor),
    /// Numbers of a shape, which only this slot holds: more is added to them in place.
    Own(Vec<f32>, Shape),
}

impl Slot {
    fn tensor(self, engine: &Engine) -> Result<Tensor> {
        match self {
            Slot::Shared(tensor) => Ok(tensor),
            Slot::Own(values, shape) => engine.tensor(values, shape.dims()),
        }
    }
}

/// Where a pullback puts its results.
pub struct Sink<'a> {
    engine: &'a Engine,
    inputs: &'a [Place],
    nodes: &'a [Node],
    slots: &'a mut [Option<Slot>],
    sums: &'a mut GradientSums,
}

impl<'a> Sink<'a> {
    /// Whether input `i` of the operation needs a gradient.
    pub fn wants(&self, i: usize) -> bool {
        self.inputs[i].0.is_some()
    }

    /// Adds `gradient` to that of input `i`; ignored if nobody asked for it.
    pub fn give(&mut self, i: usize, gradient: Tensor) -> Result<()> {
        let Some(node) = self.inputs[i].0 else { return Ok(()) };
        let sum = match self.slots[node].take() {
            None => Slot::Shared(gradient),
            Some(Slot::Shared(before)) => Slot::Shared(self.engine.add(&before, &gradient)?),
            Some(Slot::Own(mut values, shape)) => {
                add_to(&mut values, &gradient)?;
                Slot::Own(values, shape)
            }
        };
        self.slots[node] = Some(sum);
        Ok(())
    }

    /// [`Sink::give`] of numbers that nobody else holds, on the CPU.
    pub(super) fn give_own(
        &mut self,
        i: usize,
        mut gradient: Vec<f32>,
        shape: &Shape,
    ) -> Result<()> {
        let Some(node) = self.inputs[i].0 else { return Ok(()) };
        if let Some(before) = self.slots[node].take() {
            add_to(&mut gradient, &before.tensor(self.engine)?)?;
        }
        self.slots[node] = Some(Slot::Own(gradient, shape.clone()));
        Ok(())
    }

    /// Sums over rows, `len` numbers each, to add the gradients of the given inputs to. Those of
    /// parameters go on from the passes before. They are handed back to [`Sink::give_rows`].
    pub(super) fn take_rows<const N: usize>(&mut self, of: [(usize, usize); N]) -> [RowSum; N] {
        let running = of.iter().all(|(i, _)| self.param(*i).is_some());
        of.map(|(i, len)| match self.param(i).filter(|_| running) {
            Some(key) => self.sums.take(key, len),
            None => RowSum::new(len),
        })
    }

    /// Takes back the sums of [`Sink::take_rows`].
    pub(super) fn give_rows<const N: usize>(
        &mut self,
        of: [(usize, RowSum, Layout); N],
    ) -> Result<()> {
        let running = of.iter().all(|(i, ..)| self.param(*i).is_some());
        for (i, sum, layout) in of {
            match self.param(i).filter(|_| running) {
                Some(key) => self.sums.put(key, sum, layout),
                None if self.wants(i) => self.give(i, layout.tensor(self.engine, sum)?)?,
                None => {}
            }
        }
        Ok(())
    }

    /// The key of input `i`, if it is a parameter.
    fn param(&self, i: usize) -> Option<&'a str> {
        match self.nodes.get(self.inputs[i].0?)? {
            Node::Param(key) => Some(key),
            _ => None,
        }
    }
}

/// Adds the numbers of a tensor.
fn add_to(values: &mut [f32], tensor: &Tensor) -> Result<()> {
    let _span = trace_span!("add", bytes = 12 * values.len()).entered();
    slices::add_to(values, &host(tensor)?);
    Ok(())
}

/// The record of one forward pass.
pub struct Tape {
    engine: Engine,
    recording: bool,
    /// Whether results that are cheap to make again are kept nevertheless.
    keeps_cheap: bool,
    nodes: RefCell<Vec<Node>>,
}

impl Tape {
    /// A tape that records, for training.
    pub fn recording(engine: &Engine) -> Self {
        Self::new(engine, (true, false))
    }

    /// A tape that records and keeps results that are cheap to make again too: faster where the way back begins
    /// at once, so that little is kept at a time.
    pub fn keeping_all(engine: &Engine) -> Self {
        Self::new(engine, (true, true))
    }

    /// A tape that records nothing, for inference.
    pub fn off(engine: &Engine) -> Self {
        Self::new(engine, (false, false))
    }

    fn new(engine: &Engine, (recording, keeps_cheap): (bool, bool)) -> Self {
        let nodes = RefCell::new(Vec::new());
        Tape { engine: engine.clone(), recording, keeps_cheap, nodes }
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
        self.leaf(Value::constant(tensor.clone()), || Node::Param(key.to_string()))
    }

    /// An input whose gradient is wanted from [`Tape::backward_to_input`].
    pub fn input(&self, tensor: &Tensor) -> Value {
        self.leaf(Value::constant(tensor.clone()), || Node::Input)
    }

    /// [`Tape::input`] that is another tape's value: cheap to make again if that is.
    pub fn input_from(&self, value: &Value) -> Value {
        self.leaf(value.clone(), || Node::Input)
    }

    fn leaf(&self, value: Value, node: impl FnOnce() -> Node) -> Value {
        match self.recording {
            true => Value::at(value.tensor().clone(), self.add(node()), value.again()),
            false => Value::constant(value.tensor().clone()),
        }
    }

    fn add(&self, node: Node) -> usize {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(node);
        nodes.len() - 1
    }

    /// Records the result of an operation; `pullback` gets the gradient of `result` and a [`Sink`]
    /// whose inputs are numbered as in `inputs`. `make` runs only if somebody wants a gradient.
    pub fn push<F>(&self, result: Tensor, inputs: &[&Value], make: impl FnOnce() -> F) -> Value
    where
        F: FnOnce(Tensor, &mut Sink) -> Result<()> + 'static,
    {
        self.record(result, inputs, || (make(), None))
    }

    /// [`Tape::push`] of a result that is cheap to make again: `make` also returns how, from what
    /// the pullback keeps anyway.
    pub fn push_cheap<F, A>(
        &self,
        result: Tensor,
        inputs: &[&Value],
        make: impl FnOnce() -> (F, A),
    ) -> Value
    where
        F: FnOnce(Tensor, &mut Sink) -> Result<()> + 'static,
        A: FnOnce() -> Result<Tensor> + 'static,
    {
        self.record(result, inputs, || {
            let (pullback, again) = make();
            (pullback, (!self.keeps_cheap).then(|| Again::new(again)))
        })
    }

    fn record<F>(
        &self,
        result: Tensor,
        inputs: &[&Value],
        make: impl FnOnce() -> (F, Option<Again>),
    ) -> Value
    where
        F: FnOnce(Tensor, &mut Sink) -> Result<()> + 'static,
    {
        if !self.recording || !inputs.iter().any(|input| input.is_tracked()) {
            return Value::constant(result);
        }
        let (pullback, again) = make();
        let inputs = inputs.iter().map(|input| input.place()).collect();
        let node = self.add(Node::Op { inputs, pullback: Box::new(pullback) });
        Value::at(result, node, again.map(Rc::new))
    }

    /// Gradients of all parameters that `root` depends on, given d(loss)/d(root).
    ///
    /// Consumes the record; activations are freed as the pass goes down.
    pub fn backward(self, root: &Value, gradient: Tensor) -> Result<Gradients> {
        let (engine, mut sums) = (self.engine.clone(), GradientSums::new());
        self.backward_into(root.place(), gradient, Place(None), &mut sums)?;
        sums.finish(&engine)
    }

    /// Like [`Tape::backward`], and also the gradient of one input made by [`Tape::input`].
    pub fn backward_to_input(
        self,
        root: &Value,
        gradient: Tensor,
        input: &Value,
    ) -> Result<(Option<Tensor>, Gradients)> {
        let (engine, mut sums) = (self.engine.clone(), GradientSums::new());
        let dx = self.backward_into(root.place(), gradient, input.place(), &mut sums)?;
        Ok((dx, sums.finish(&engine)?))
    }

    /// Like [`Tape::backward_to_input`], the gradients of parameters added to `sums`.
    pub fn backward_into(
        self,
        root: Place,
        gradient: Tensor,
        input: Place,
        sums: &mut GradientSums,
    ) -> Result<Option<Tensor>> {
        let Some(top) = root.0 else { return Ok(None) };
        let mut nodes = self.nodes.into_inner();
        nodes.truncate(top + 1);
        let mut slots: Vec<Option<Slot>> = Vec::new();
        slots.resize_with(nodes.len(), || None);
        slots[top] = Some(Slot::Shared(gradient));
        while let Some(node) = nodes.pop() {
            if Some(nodes.len()) == input.0 {
                continue;
            }
            let Some(gradient) = slots[nodes.len()].take() else { continue };
            let engine = &self.engine;
            let gradient = gradient.tensor(engine)?;
            match node {
                Node::Input => {}
                Node::Param(key) => sums.add(engine, &key, gradient)?,
                Node::Op { inputs, pullback } => {
                    let (inputs, nodes, slots) = (&*inputs, &*nodes, &mut *slots);
                    pullback(gradient, &mut Sink { engine, inputs, nodes, slots, sums })?;
                }
            }
        }
        let wanted = input.0.and_then(|node| slots[node].take());
        wanted.map(|slot| slot.tensor(&self.engine)).transpose()
    }
}
