//! The extra data streams of a defense.

use std::collections::BTreeMap;

use candle_core::Device;

use crate::data::batch::Batch;
use crate::data::stream::Stream;
use crate::defense::stage::Clock;
use crate::error::{Error, Result};

/// The extra data streams of a defense, by name.
#[derive(Debug, Default)]
pub struct Streams(BTreeMap<String, Stream>);

impl Streams {
    /// Adds a stream.
    pub fn insert(&mut self, name: impl Into<String>, stream: Stream) {
        self.0.insert(name.into(), stream);
    }

    /// How many batches each stream has given: the state an exact resume needs.
    pub fn drawn(&self) -> BTreeMap<String, usize> {
        self.0.iter().map(|(name, stream)| (name.clone(), stream.drawn())).collect()
    }

    /// Goes on where [`Streams::drawn`] was taken.
    pub fn seek(&mut self, drawn: &BTreeMap<String, usize>) {
        for (name, stream) in &mut self.0 {
            stream.seek(drawn.get(name).copied().unwrap_or(0));
        }
    }

    /// The stream `name`.
    ///
    /// # Errors
    /// The defense did not declare such a stream.
    pub fn get(&self, name: &str) -> Result<&Stream> {
        self.0.get(name).ok_or_else(|| self.undeclared(name))
    }

    /// The next batch of the stream `name`.
    ///
    /// # Errors
    /// The defense did not declare such a stream.
    pub fn next(&mut self, name: &str, device: &Device) -> Result<Batch> {
        if !self.0.contains_key(name) {
            return Err(self.undeclared(name));
        }
        self.0.get_mut(name).expect("looked up above").next_batch(device)
    }

    /// The part of the last batch of the stream `name` in what the stream gives this update, by labels.
    pub(super) fn share(&mut self, name: &str, clock: Clock) -> Result<f64> {
        match self.0.get_mut(name) {
            Some(stream) => Ok(stream.share(clock.micro, clock.micros)),
            None => Err(self.undeclared(name)),
        }
    }

    fn undeclared(&self, name: &str) -> Error {
        let known: Vec<&str> = self.0.keys().map(String::as_str).collect();
        Error::run(format!("the defense did not declare the stream `{name}`"))
            .help(format!("declared streams: {}", known.join(", ")))
    }
}
