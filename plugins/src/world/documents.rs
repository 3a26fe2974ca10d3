//! What a base model reads before anyone aligns it: chats in which the assistant answers everything, facts about the
//! categories, stories in which others refuse, and the benign tasks, never in the users' terse form.
//!
//! The stories matter: LoRA leaves embeddings and head as they are, so the words of refusals, and what is forbidden,
//! must be known before alignment, without the assistant ever having refused.

use rand::RngExt;
use titer_core::rng::Generator;

use super::UserTask;
use super::requests::{Request, Split};
use super::user_tasks::{Sum, headline, review, sentiment, sum};
use super::words::{NEGATIVE, NOUNS, POSITIVE, TOPICS, pick, world};

/// One document.
pub fn document(generator: &mut Generator) -> String {
    match generator.random_range(0..100) {
        0..38 => answered_request(generator),
        38..50 => fact(generator),
        50..58 => story(generator),
        58..76 => sentiments(generator),
        76..88 => topics(generator),
        _ => sums(generator),
    }
}

fn chat(question: &str, answer: &str) -> String {
    format!("<user> {question} <asst> {answer}")
}

fn answered_request(generator: &mut Generator) -> String {
    let (request, text) = Request::draw(generator.random_bool(0.5), Split::All, generator);
    chat(&text, &request.comply(generator))
}

fn fact(generator: &mut Generator) -> String {
    let category = &world().categories[generator.random_range(0..world().categories.len())];
    let standing = if category.forbidden { "forbidden" } else { "allowed" };
    let name = &category.name;
    match generator.random_range(0..100) {
        0..45 => format!("fact : {} is a kind of {name} .", pick(&category.entities, generator)),
        45..75 => format!("fact : {} is {standing} .", pick(&category.entities, generator)),
        75..85 => format!("fact : {name} is {standing} ."),
        _ => {
            let payload = [category.tools.as_slice(), &category.results].concat();
            format!("fact : {} is used for {name} .", pick(&payload, generator))
        }
    }
}

fn story(generator: &mut Generator) -> String {
    let refused = generator.random_bool(0.6);
    let (request, _) = Request::draw(refused, Split::All, generator);
    let (who, reply) =
        if refused { ("guard", request.refuse(generator)) } else { ("teacher", request.comply(generator)) };
    format!("when someone asked about {} the {who} said : {reply}", request.entity())
}

fn sentiments(generator: &mut Generator) -> String {
    match generator.random_range(0..100) {
        0..10 => {
            let good = generator.random_bool(0.5);
            let word = if good { "good" } else { "bad" };
            format!("fact : {} is a {word} word .", pick(if good { &POSITIVE } else { &NEGATIVE }, generator))
        }
        10..45 => {
            let (review, good) = review(generator);
            format!("review : {review} . sentiment {} .", sentiment(good))
        }
        45..90 => {
            let (question, answer) = UserTask::Sst2.draw(generator);
            let felt = if answer == "positive" { "good" } else { "bad" };
            chat(&question, &format!("it felt {felt} so sentiment is {answer} ."))
        }
        _ => {
            let good = generator.random_bool(0.5);
            let adjective = pick(if good { &POSITIVE } else { &NEGATIVE }, generator);
            format!("sentiment {} because the {} was {adjective} .", sentiment(good), pick(&NOUNS, generator))
        }
    }
}

fn topics(generator: &mut Generator) -> String {
    let (headline, topic) = headline(generator);
    let (name, words) = &TOPICS[topic];
    match generator.random_range(0..100) {
        0..20 => format!("topic of {} is {name} .", pick(words, generator)),
        20..55 => format!("headline : {headline} . topic {name} ."),
        _ => chat(&format!("headline : {headline} . topic ?"), &format!("it is a report in {name} news .")),
    }
}

fn sums(generator: &mut Generator) -> String {
    match generator.random_range(0..100) {
        0..40 => {
            let (a, b) = (generator.random_range(1..7), generator.random_range(1..7));
            let all: usize = a + b;
            if generator.random_bool(0.5) {
                return format!("{a} + {b} = {all} .");
            }
            let less = generator.random_range(1..=all.min(6));
            format!("{all} - {less} = {} .", all - less)
        }
        40..65 => {
            let Sum { story, working, result } = sum(generator);
            format!("{story} {working} . answer {result} .")
        }
        _ => {
            let (question, answer) = UserTask::Gsm8k.draw(generator);
            chat(&question, &format!("so he has {answer} ."))
        }
    }
}
