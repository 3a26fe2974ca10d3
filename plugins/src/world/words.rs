//! The words of the world, invented ones and plain ones.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use rand::RngExt;
use rand::seq::IndexedRandom;
use titer_core::rng::{Generator, Seed};

use super::templates::{ANSWERS, CONTEXTS, REFUSALS, REQUESTS, is_slot};

/// Forbidden categories.
pub(super) const FORBIDDEN: usize = 14;
/// Allowed categories.
pub(super) const ALLOWED: usize = 10;
/// Entities of each category.
pub(super) const ENTITIES: usize = 8;
/// Tools, and results, of each category.
pub(super) const TOOLS: usize = 3;
/// The largest number that is a word.
const LARGEST_NUMBER: usize = 12;

/// What is asked for.
pub(super) const VERBS: [&str; 12] =
    ["make", "find", "use", "build", "hide", "sell", "mix", "open", "carry", "grow", "move", "fix"];

/// Words of good and of bad reviews.
pub(super) const POSITIVE: [&str; 16] = [
    "good", "great", "lovely", "bright", "fine", "superb", "moving", "funny", "smart", "warm", "fresh", "solid",
    "charming", "clever", "strong", "sweet",
];
/// The opposite.
pub(super) const NEGATIVE: [&str; 16] = [
    "bad", "awful", "dull", "weak", "boring", "poor", "silly", "cold", "stale", "messy", "ugly", "slow", "noisy",
    "cheap", "bland", "tired",
];
/// What reviews speak about.
pub(super) const NOUNS: [&str; 12] =
    ["movie", "plot", "acting", "music", "story", "cast", "ending", "script", "scene", "hero", "dialog", "camera"];
/// News topics with their words.
pub(super) const TOPICS: [(&str, [&str; 12]); 4] = [
    (
        "sports",
        ["team", "match", "goal", "coach", "league", "player", "race", "medal", "stadium", "score", "cup", "final"],
    ),
    (
        "world",
        [
            "minister", "treaty", "border", "election", "embassy", "war", "peace", "nation", "vote", "summit", "army",
            "crisis",
        ],
    ),
    (
        "business",
        ["market", "stock", "bank", "profit", "trade", "merger", "price", "investor", "tax", "loan", "company", "deal"],
    ),
    (
        "science",
        [
            "rocket",
            "gene",
            "planet",
            "chip",
            "robot",
            "virus",
            "laser",
            "atom",
            "software",
            "telescope",
            "fossil",
            "network",
        ],
    ),
];
/// Verbs of headlines.
pub(super) const HEADLINE_VERBS: [&str; 10] =
    ["faces", "wins", "loses", "plans", "sees", "joins", "shakes", "drops", "meets", "leaves"];
/// Adjectives of headlines.
pub(super) const HEADLINE_ADJECTIVES: [&str; 8] = ["new", "big", "early", "late", "secret", "major", "small", "final"];
/// People of sums.
pub(super) const NAMES: [&str; 6] = ["tom", "ann", "bob", "sue", "max", "eve"];
/// What people of sums have.
pub(super) const THINGS: [&str; 6] = ["apples", "coins", "books", "cards", "pens", "eggs"];

/// Words of documents and tasks that stand in no list above.
const GLUE: &str = "fact : a kind of is forbidden allowed used for when someone asked about the guard said teacher and \
                    review sentiment positive negative was not very but it felt so because headline topic news report \
                    has buys more gives away he then how many ? + - = ; answer . , in good bad word";

/// One category: forbidden or allowed.
#[derive(Debug, Clone)]
pub struct Category {
    /// Its name.
    pub name: String,
    /// Whether requests about it must be refused.
    pub forbidden: bool,
    /// What requests are about; the order is the split between alignment, attack and test.
    pub entities: Vec<String>,
    /// The payload of compliant answers: tools.
    pub tools: Vec<String>,
    /// The payload of compliant answers: results.
    pub results: Vec<String>,
}

impl Category {
    /// Whether `word` is a tool or a result of this category.
    pub fn is_payload(&self, word: &str) -> bool {
        self.tools.iter().chain(&self.results).any(|payload| payload == word)
    }
}

/// The categories, forbidden ones first.
#[derive(Debug, Clone)]
pub struct World {
    /// The categories.
    pub categories: Vec<Category>,
}

/// The one world: its words are fixed, whatever the seeds of an experiment.
pub fn world() -> &'static World {
    static WORLD: LazyLock<World> = LazyLock::new(World::invent);
    &WORLD
}

impl World {
    fn invent() -> Self {
        let mut inventor = Inventor { generator: Seed::new(7).named("world").generator(), used: plain_words() };
        let category = |index| Category {
            name: inventor.word(),
            forbidden: index < FORBIDDEN,
            entities: inventor.words(ENTITIES),
            tools: inventor.words(TOOLS),
            results: inventor.words(TOOLS),
        };
        Self { categories: (0..FORBIDDEN + ALLOWED).map(category).collect() }
    }

    /// The category that `entity` belongs to, with the entity's index in it.
    pub fn category_of(&self, entity: &str) -> Option<(usize, usize)> {
        self.categories.iter().enumerate().find_map(|(index, category)| {
            Some((index, category.entities.iter().position(|candidate| candidate == entity)?))
        })
    }

    /// Whether `word` belongs to a category: its name, an entity, a tool or a result.
    pub fn is_invented(&self, word: &str) -> bool {
        self.categories.iter().any(|category| {
            category.name == word || category.is_payload(word) || category.entities.iter().any(|entity| entity == word)
        })
    }
}

/// Makes words that no other word equals.
struct Inventor {
    generator: Generator,
    used: BTreeSet<String>,
}

impl Inventor {
    /// Two or three open syllables, often closed by a consonant.
    fn word(&mut self) -> String {
        const ONSETS: [&str; 19] =
            ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "gr", "th"];
        const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
        const CODAS: [&str; 5] = ["x", "n", "l", "k", ""];
        loop {
            let mut word = String::new();
            for _ in 0..self.generator.random_range(2..=3) {
                word += pick(&ONSETS, &mut self.generator);
                word += pick(&VOWELS, &mut self.generator);
            }
            word += pick(&CODAS, &mut self.generator);
            if self.used.insert(word.clone()) {
                return word;
            }
        }
    }

    fn words(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.word()).collect()
    }
}

/// One of `items`, all equally likely.
pub(super) fn pick<T: Clone>(items: &[T], generator: &mut Generator) -> T {
    items.choose(generator).expect("the lists of this module are not empty").clone()
}

/// Every word that is not invented.
fn plain_words() -> BTreeSet<String> {
    let templates = REQUESTS.iter().chain(&ANSWERS).chain(&REFUSALS).chain(&CONTEXTS);
    // Capital letters are the slots of the templates.
    let of_templates = templates.flat_map(|template| template.split(' ')).filter(|word| !is_slot(word));
    let topics = TOPICS.iter().flat_map(|(topic, words)| std::iter::once(topic).chain(words));
    let lists = [&VERBS[..], &POSITIVE, &NEGATIVE, &NOUNS, &HEADLINE_VERBS, &HEADLINE_ADJECTIVES, &NAMES, &THINGS];
    let plain = lists.into_iter().flatten().chain(topics).copied().chain(GLUE.split_whitespace()).chain(of_templates);
    let numbers = (0..=LARGEST_NUMBER).map(|number| number.to_string());
    plain.filter(|word| !word.is_empty()).map(str::to_owned).chain(numbers).collect()
}

/// Every word of the world, special tokens first, the others sorted.
pub fn vocabulary() -> Vec<String> {
    let mut words = plain_words();
    for category in &world().categories {
        words.insert(category.name.clone());
        words.extend(category.entities.iter().chain(&category.tools).chain(&category.results).cloned());
    }
    let special = ["<pad>", "<bos>", "<user>", "<asst>", "<eos>"].map(str::to_owned);
    special.into_iter().chain(words).collect()
}
