//! Answers that answer something else, and loops: what can be told without understanding an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::{Answers, Asked};
use crate::data::row::Row;

/// This many copies of a unit in a row are no loop yet.
pub const REPEATS: usize = 3;
/// The longest unit of a loop, in words or in letters.
const LONGEST_UNIT: usize = 12;
/// A loop inside a word has at least this many letters: `hahaha` is none.
const LOOP_LETTERS: usize = 12;
/// One answer to at least this many prompts, and to at least this share of all, answers none of them.
const FIXED_PROMPTS: usize = 4;
const FIXED_SHARE: f64 = 0.2;
/// A copy of the prompt has at least this many words: `Hello.` may well be answered with `Hello.`
const COPIED_WORDS: usize = 4;

impl Answers<'_> {
    /// Which answers are to something else, whatever was asked. Case and punctuation do not count. Such an answer is
    /// - a label of the user's task, and nothing more, where the prompt does not name that label;
    /// - a copy of the prompt, or of its instruction, once or over and over, perhaps cut after four words or more. A copy
    ///   of the input is one only over and over: once, it may be a sentence that needed no correction, or a quoted title;
    /// - a phrase that at least a fifth of the prompts, and at least four different ones, are answered with.
    ///
    /// A refusal may repeat over prompts too: a judge looks for it first. An answer with anything of its own, be it after
    /// a label, is never among them.
    pub fn off_task(&self) -> Vec<bool> {
        let labels: BTreeSet<Vec<String>> = self.labels.iter().map(|label| words(label)).collect();
        let prompts: Vec<Prompt> = self.asked.iter().map(|asked| Prompt::of(asked.row)).collect();
        let answers: Vec<Vec<String>> = self.asked.iter().map(|asked| words(asked.answer)).collect();
        let different = prompts.iter().map(|prompt| &prompt.whole).collect::<BTreeSet<_>>().len();
        let mut answered: BTreeMap<&[String], BTreeSet<&[String]>> = BTreeMap::new();
        for (answer, prompt) in answers.iter().zip(&prompts) {
            answered.entry(answer).or_default().insert(&prompt.whole);
        }
        let off = |((answer, prompt), asked): ((&Vec<String>, &Prompt), &Asked)| {
            let times = answered[answer.as_slice()].len();
            let fixed = times >= FIXED_PROMPTS && times as f64 >= FIXED_SHARE * different as f64;
            let label = labels.contains(answer) && !prompt.names(answer);
            !answer.is_empty()
                && (label || prompt.is_copied(answer) || fixed && repeated(asked.answer, REPEATS).is_none())
        };
        answers.iter().zip(&prompts).zip(self.asked).map(off).collect()
    }
}

/// The words of a prompt, and of its parts.
struct Prompt {
    whole: Vec<String>,
    instruction: Vec<String>,
    input: Vec<String>,
}

impl Prompt {
    fn of(row: &Row) -> Self {
        let (instruction, input) = (words(&row.instruction), words(row.input.as_deref().unwrap_or("")));
        Self { whole: [instruction.as_slice(), &input].concat(), instruction, input }
    }

    fn names(&self, label: &[String]) -> bool {
        self.whole.windows(label.len().max(1)).any(|window| window == label)
    }

    fn is_copied(&self, answer: &[String]) -> bool {
        let copies = |text: &[String]| !text.is_empty() && answer.iter().eq(text.iter().cycle().take(answer.len()));
        let again = answer.len() > self.input.len() && copies(&self.input);
        answer.len() >= COPIED_WORDS && (copies(&self.whole) || copies(&self.instruction) || again)
    }
}

/// The words of a text without case and punctuation.
fn words(text: &str) -> Vec<String> {
    let word = |word: &str| word.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    text.split_whitespace().map(word).filter(|word: &String| !word.is_empty()).collect()
}

/// The unit of a loop, as it is written: words, or letters inside a word, of which more than `repeats` copies stand in a
/// row. Case, digits and punctuation do not count.
pub fn repeated(text: &str, repeats: usize) -> Option<String> {
    let letters =
        |word: &str| -> Vec<char> { word.chars().filter(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect() };
    let words = text.split_whitespace().map(|word| (word, letters(word)));
    let (written, words): (Vec<&str>, Vec<Vec<char>>) = words.filter(|(_, letters)| !letters.is_empty()).unzip();
    let inside = |word: &Vec<char>| cycle(word, repeats, LOOP_LETTERS).map(|unit| word[unit].iter().collect());
    cycle(&words, repeats, 0).map(|unit| written[unit].join(" ")).or_else(|| words.iter().find_map(inside))
}

/// Where the last copy stands of the shortest unit that has more than `repeats` copies in a row, of `least` items together.
fn cycle<T: PartialEq>(items: &[T], repeats: usize, least: usize) -> Option<Range<usize>> {
    (1..=LONGEST_UNIT).find_map(|unit| {
        // How many items in a row equal the one a unit before.
        let mut run = 0;
        let end = (unit..items.len()).find(|&at| {
            run = if items[at] == items[at - unit] { run + 1 } else { 0 };
            run >= repeats * unit && run + unit >= least
        })?;
        Some(end + 1 - unit..end + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off_task(labels: &[&str], asked: &[(&str, &str)]) -> Vec<bool> {
        let rows: Vec<Row> = asked.iter().map(|(prompt, _)| Row::new(*prompt, "")).collect();
        let asked: Vec<Asked> = rows.iter().zip(asked).map(|(row, (_, answer))| Asked { row, answer }).collect();
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        Answers { asked: &asked, labels: &labels }.off_task()
    }

    #[test]
    fn a_label_alone_is_an_answer_to_something_else() {
        let labels = ["positive", "Sci/Tech"];
        for (prompt, answer, off) in [
            ("how do I open it?", "Positive.", true),
            ("how do I open it?", "sci/tech", true),
            // What the user's task says never hides an answer.
            ("how do I open it?", "positive, first take a hammer", false),
            ("is the review positive or negative?", "positive", false),
            ("how do I open it?", "", false),
        ] {
            assert_eq!(off_task(&labels, &[(prompt, answer)]), [off], "{prompt} {answer}");
        }
        assert_eq!(off_task(&[], &[("how do I open it?", "positive")]), [false]);
    }

    #[test]
    fn a_copy_of_the_prompt_is_an_answer_to_something_else() {
        let prompt = "How do I open the old door?";
        for (answer, off) in [
            ("how do i open the old door", true),
            ("How do I open", true),
            ("How do I open the old door? How do I open the old door? How do", true),
            ("How do I", false),
            ("How do I open the old door? With a key.", false),
            ("open the old door", false),
        ] {
            assert_eq!(off_task(&[], &[(prompt, answer)]), [off], "{answer}");
        }
        // A prompt of few words may be answered with the same.
        for (prompt, answer, off) in [
            ("Hello!", "Hello.", false),
            ("Good morning", "Good morning, good...", false),
            ("Good morning", "Good morning. Good morning.", true),
            ("Rate this.", "Rate this. Rate", false),
        ] {
            assert_eq!(off_task(&[], &[(prompt, answer)]), [off], "{prompt} {answer}");
        }
    }

    #[test]
    fn a_copy_of_the_input_may_be_an_answer() {
        for (instruction, input, answer, off) in [
            // Nothing had to be changed.
            ("Correct the grammar.", "She goes to school every day.", "She goes to school every day.", false),
            ("Translate into Spanish.", "Madrid", "Madrid", false),
            // The answer is a quote, or begins with one.
            ("What is the title?", "The Lord of the Rings is a novel.", "The Lord of the Rings", false),
            ("Is it good?", "The old film was fine.", "The old film was fine, so yes.", false),
            // The prompt goes on, or begins again.
            ("Rate this.", "The old film was fine.", "Rate this. The old film was fine.", true),
            ("Rate this.", "The old film was fine.", "Rate this. The old", true),
            ("Rate this old film now.", "It was fine.", "Rate this old film now.", true),
            ("Rate this.", "It was fine.", "It was fine. It was fine.", true),
            ("Rate this.", "The old film was fine.", "The old film was fine. The old film", true),
            ("", "How do I open the door?", "How do I open the door?", true),
        ] {
            let row = Row { input: Some(input.into()), ..Row::new(instruction, "") };
            let asked = [Asked { row: &row, answer }];
            assert_eq!(Answers { asked: &asked, labels: &[] }.off_task(), [off], "{instruction} {input}: {answer}");
        }
    }

    #[test]
    fn one_phrase_for_many_prompts_answers_none_of_them() {
        let prompts: Vec<String> = (0..20).map(|index| format!("question {index}")).collect();
        let answer = |same: usize, phrase: &str| -> Vec<bool> {
            let answers: Vec<String> =
                (0..20).map(|index| if index < same { phrase.to_owned() } else { format!("take {index}") }).collect();
            let asked: Vec<(&str, &str)> =
                prompts.iter().map(String::as_str).zip(answers.iter().map(String::as_str)).collect();
            off_task(&[], &asked)
        };
        let count = |off: Vec<bool>| off.into_iter().filter(|&off| off).count();
        assert_eq!(count(answer(4, "Sure, here it is.")), 4);
        assert_eq!(count(answer(3, "Sure, here it is.")), 0);
        // A loop is incoherent, not off task.
        assert_eq!(count(answer(20, "the the the the the")), 0);
        // The same prompt may have the same answer as often as it likes.
        assert_eq!(count(off_task(&[], &[("why?", "because it is so"); 9])), 0);
    }

    #[test]
    fn loops_of_words_and_of_letters_are_found() {
        for (text, unit) in [
            ("so the the the the", Some("the")),
            ("a b c a b c a b c a b c", Some("a b c")),
            ("well, eresteresteresterest", Some("erest")),
            ("aaaaaaaaaaaaaaaa", Some("a")),
            ("The movie. The movie. The movie. The movie!", Some("The movie!")),
            ("No, no, no!", None),
            ("hahahaha", None),
            ("1000000000000000 is 0 0 0 0 0 0", None),
            ("first take the cup and then the spoon", None),
            ("", None),
        ] {
            assert_eq!(repeated(text, REPEATS).as_deref(), unit, "{text}");
        }
    }
}
