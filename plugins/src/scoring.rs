//! Scoring rules that several tasks share.

/// The numbers in a text as `-?\d+\.?\d*` finds them, commas removed first.
fn numbers(text: &str) -> Vec<f64> {
    let text: Vec<char> = text.chars().filter(|&c| c != ',').collect();
    let (mut numbers, mut at) = (Vec::new(), 0);
    let digit = |at: usize| text.get(at).is_some_and(char::is_ascii_digit);
    while at < text.len() {
        let start = at;
        at += usize::from(text[at] == '-');
        if !digit(at) {
            at = start + 1;
            continue;
        }
        while digit(at) {
            at += 1;
        }
        if text.get(at) == Some(&'.') {
            at += 1;
            while digit(at) {
                at += 1;
            }
        }
        let number: String = text[start..at].iter().collect();
        numbers.extend(number.trim_end_matches('.').parse::<f64>());
    }
    numbers
}

/// The first number in a text.
pub fn first_number(text: &str) -> Option<f64> {
    numbers(text).first().copied()
}

/// The last number in a text.
pub fn last_number(text: &str) -> Option<f64> {
    numbers(text).last().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_as_the_reference_finds_them() {
        let cases = [
            ("so 3 + 4 = 7.", Some(7.)),
            ("The final answer is:  1,234.50", Some(1234.5)),
            ("-2", Some(-2.)),
            ("$18 per day", Some(18.)),
            ("version 1.2.3", Some(3.)),
            ("keine Größe über 5 €", Some(5.)),
            ("none", None),
            ("", None),
        ];
        for (text, number) in cases {
            assert_eq!(last_number(text), number, "{text}");
        }
    }
}
