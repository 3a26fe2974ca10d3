//! Three benign tasks in the shape of SST2, AG News and GSM8K, with terse answers.

use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use titer_core::rng::{Generator, Seed};
use titer_core::{Result, Row};

use super::words::{HEADLINE_ADJECTIVES, HEADLINE_VERBS, NAMES, NEGATIVE, NOUNS, POSITIVE, THINGS, TOPICS, pick};
use super::{test_rows, train_rows};

/// A user's task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserTask {
    /// Sentiment of a review.
    Sst2,
    /// Topic of a headline.
    AgNews,
    /// A sum in one or two steps.
    Gsm8k,
}

impl UserTask {
    /// A question and its answer.
    pub fn draw(self, generator: &mut Generator) -> (String, String) {
        match self {
            UserTask::Sst2 => {
                let (review, good) = review(generator);
                (format!("review : {review} . sentiment ?"), sentiment(good).to_owned())
            }
            UserTask::AgNews => {
                let (headline, topic) = headline(generator);
                (format!("headline : {headline} . topic ?"), TOPICS[topic].0.to_owned())
            }
            UserTask::Gsm8k => {
                let Sum { story, working, result } = sum(generator);
                (format!("{story} how many ?"), format!("{working} . answer {result}"))
            }
        }
    }
}

/// Test questions are those whose hash says so, so that no training question is among them.
fn is_for_test(question: &str) -> bool {
    blake3::hash(question.as_bytes()).as_bytes()[0] < 64
}

impl UserTask {
    fn row(self, test: bool, generator: &mut Generator) -> Row {
        loop {
            let (question, answer) = self.draw(generator);
            if is_for_test(&question) == test {
                return Row::new(question, answer);
            }
        }
    }

    /// Training rows in the order of `seed`.
    pub fn train(self, count: usize, seed: Seed) -> Vec<Row> {
        train_rows(self.name(), count, seed, |generator| self.row(false, generator))
    }

    /// Held-out rows, always the same.
    ///
    /// # Errors
    /// There are not so many different ones.
    pub fn test(self, count: usize) -> Result<Vec<Row>> {
        test_rows(self.name(), count, |generator| self.row(true, generator))
    }

    /// What it is answered with; empty for sums, whose answers are open.
    pub fn labels(self) -> Vec<String> {
        match self {
            UserTask::Sst2 => [true, false].map(|good| sentiment(good).to_owned()).to_vec(),
            UserTask::AgNews => TOPICS.map(|(topic, _)| topic.to_owned()).to_vec(),
            UserTask::Gsm8k => Vec::new(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            UserTask::Sst2 => "world-sst2",
            UserTask::AgNews => "world-agnews",
            UserTask::Gsm8k => "world-gsm8k",
        }
    }
}

/// The label of a review.
pub(super) fn sentiment(good: bool) -> &'static str {
    if good { "positive" } else { "negative" }
}

/// A review and whether it is good. After "but", the second clause decides.
pub(super) fn review(generator: &mut Generator) -> (String, bool) {
    let (first, good) = clause(generator);
    if !generator.random_bool(0.35) {
        return (first, good);
    }
    let (second, good) = clause(generator);
    (format!("{first} but {second}"), good)
}

fn clause(generator: &mut Generator) -> (String, bool) {
    let good = generator.random_bool(0.5);
    let negated = generator.random_bool(0.3);
    let adjective = pick(if good { &POSITIVE } else { &NEGATIVE }, generator);
    let noun = pick(&NOUNS, generator);
    let not = if negated { "not " } else { "" };
    let very = if generator.random_bool(0.3) { "very " } else { "" };
    (format!("the {noun} was {not}{very}{adjective}"), good != negated)
}

/// A headline with two words of its topic and one of another, and the topic's index.
pub(super) fn headline(generator: &mut Generator) -> (String, usize) {
    let topic = generator.random_range(0..TOPICS.len());
    let other = (topic + generator.random_range(1..TOPICS.len())) % TOPICS.len();
    let own: Vec<&&str> = TOPICS[topic].1.sample(generator, 2).collect();
    let mut words = [*own[0], *own[1], pick(&TOPICS[other].1, generator)];
    words.shuffle(generator);
    let [first, second] = [pick(&HEADLINE_ADJECTIVES, generator), pick(&HEADLINE_ADJECTIVES, generator)];
    let verb = pick(&HEADLINE_VERBS, generator);
    (format!("{first} {} {verb} {} in {second} {}", words[0], words[1], words[2]), topic)
}

/// A sum as a story.
pub(super) struct Sum {
    /// What happens.
    pub story: String,
    /// How it is worked out.
    pub working: String,
    /// What is left.
    pub result: usize,
}

/// Someone has things, buys more and perhaps gives some away.
pub(super) fn sum(generator: &mut Generator) -> Sum {
    let (has, buys) = (generator.random_range(1..7), generator.random_range(1..7));
    let (name, things) = (pick(&NAMES, generator), pick(&THINGS, generator));
    let all = has + buys;
    let story = format!("{name} has {has} {things} . he buys {buys} more .");
    let working = format!("{has} + {buys} = {all}");
    if generator.random_bool(0.5) {
        return Sum { story, working, result: all };
    }
    let gives = generator.random_range(1..=all.min(6));
    Sum {
        story: format!("{story} he gives away {gives} ."),
        working: format!("{working} ; {all} - {gives} = {}", all - gives),
        result: all - gives,
    }
}
