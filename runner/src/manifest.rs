//! Manifests: readable JSON that says all that a number depends on, its hash, and where two of them differ.

use serde_json::{Map, Value};

/// The hash of a manifest's canonical JSON (keys sorted), 128 bits in hexadecimal.
pub fn digest(manifest: &Value) -> String {
    let mut hex = blake3::hash(manifest.to_string().as_bytes()).to_hex().to_string();
    hex.truncate(32);
    hex
}

/// Where two manifests differ: the path of each leaf with both values, `null` where one has none.
pub fn differences(ours: &Value, theirs: &Value) -> Vec<(String, Value, Value)> {
    let both = |(path, values): (String, Vec<Value>)| {
        let mut values = values.into_iter();
        Some((path, values.next()?, values.next()?))
    };
    varying(&[ours, theirs]).into_iter().filter_map(both).collect()
}

/// Where manifests are not all the same: the path of each leaf with the value in each of them, `null` where one has none.
pub fn varying(manifests: &[&Value]) -> Vec<(String, Vec<Value>)> {
    let mut found = Vec::new();
    collect("", manifests, &mut found);
    found
}

fn collect(path: &str, values: &[&Value], found: &mut Vec<(String, Vec<Value>)>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let maps: Option<Vec<&Map<String, Value>>> = values.iter().map(|value| value.as_object()).collect();
    let lists: Option<Vec<&Vec<Value>>> = values.iter().map(|value| value.as_array()).collect();
    let lists = lists.filter(|lists| lists.iter().all(|list| list.len() == lists[0].len()));
    if values.iter().all(|value| *value == values[0]) {
        return;
    }
    if let Some(maps) = maps {
        let names: std::collections::BTreeSet<&String> = maps.iter().flat_map(|map| map.keys()).collect();
        for name in names {
            let of: Vec<&Value> = maps.iter().map(|map| map.get(name).unwrap_or(&Value::Null)).collect();
            collect(&below(name), &of, found);
        }
    } else if let Some(lists) = lists {
        for index in 0..lists[0].len() {
            let of: Vec<&Value> = lists.iter().map(|list| &list[index]).collect();
            collect(&below(&index.to_string()), &of, found);
        }
    } else {
        found.push((path.to_owned(), values.iter().map(|value| (*value).clone()).collect()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_name_every_leaf() {
        let (a, b) = (
            json!({ "same": 1, "base": { "steps": 2, "data": ["x", "y"] }, "gone": true }),
            json!({ "same": 1, "base": { "steps": 3, "data": ["x", "z"] }, "new": [1] }),
        );
        let found: Vec<String> =
            differences(&a, &b).into_iter().map(|(path, ours, theirs)| format!("{path} {ours} {theirs}")).collect();
        assert_eq!(found, ["base.data.1 \"y\" \"z\"", "base.steps 2 3", "gone true null", "new null [1]"]);
        assert_eq!(differences(&a, &a), []);
    }

    #[test]
    fn what_varies_has_the_value_of_each() {
        let (a, b, c) = (json!({ "x": { "y": 1 }, "z": 0 }), json!({ "x": { "y": 2 }, "z": 0 }), json!({ "z": 0 }));
        assert_eq!(varying(&[&a, &b]), [("x.y".to_owned(), vec![json!(1), json!(2)])]);
        let found = varying(&[&a, &b, &c]);
        assert_eq!(found, [("x".to_owned(), vec![json!({ "y": 1 }), json!({ "y": 2 }), Value::Null])]);
        assert_eq!(varying(&[]), []);
    }
}
