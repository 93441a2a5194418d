//! Tables of plain texts, which `page.js` sorts by a click on a heading.

use super::text::{breakable, escape};

/// A column with a text longer than this has lines.
const LONG: usize = 48;

/// A table.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    table_with_total(head, rows, None)
}

/// A table whose last row stays below when it is sorted.
pub fn table_with_total(head: &[&str], rows: &[Vec<String>], total: Option<&[String]>) -> String {
    let classes: Vec<&str> = (0..head.len()).map(|column| class(rows, column)).collect();
    let heading = |(name, class): (&&str, &&str)| {
        format!("<th scope=\"col\"{class}><button type=\"button\">{}</button></th>", escape(name))
    };
    let line = |row: &[String]| {
        let cell = |(i, (text, class)): (usize, (&String, &&str))| match i {
            0 => format!("<th scope=\"row\"{class}>{}</th>", breakable(text)),
            _ => format!("<td{class}>{}</td>", escape(text)),
        };
        format!("<tr>{}</tr>\n", row.iter().zip(&classes).enumerate().map(cell).collect::<String>())
    };
    let head: String = head.iter().zip(&classes).map(heading).collect();
    let body: String = rows.iter().map(|row| line(row)).collect();
    let foot = total.map_or(String::new(), |row| format!("<tfoot>{}</tfoot>\n", line(row)));
    format!(
        "<div class=\"wide\"><table>\n<thead><tr>{head}</tr></thead>\n\
         <tbody>\n{body}</tbody>\n{foot}</table></div>\n"
    )
}

/// Two columns, a name and its value, in their order.
pub fn pairs(rows: &[(String, String)]) -> String {
    let row = |(name, value): &(String, String)| format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(value));
    format!("<dl class=\"pairs\">\n{}</dl>\n", rows.iter().map(row).collect::<String>())
}

/// Numbers to the right, texts to the left, the heading with its column.
fn class(rows: &[Vec<String>], column: usize) -> &'static str {
    let mut cells = rows.iter().filter_map(|row| row.get(column));
    let is_number = |text: &&String| {
        let text = text.trim_start_matches(['+', '-']);
        text.is_empty() || text == "–" || text == "diverged" || text.starts_with(|c: char| c.is_ascii_digit())
    };
    if cells.clone().any(|text| text.chars().count() > LONG) {
        " class=\"long\""
    } else if !rows.is_empty() && cells.all(|text| is_number(&text)) {
        " class=\"number\""
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_stand_with_their_columns() {
        let rows = [vec!["<a>".to_string(), "1.5 ± 0.1".into()], vec!["b".into(), "–".into()]];
        let html = table_with_total(&["name", "loss"], &rows, Some(&["all".to_string(), "-2".into()]));
        assert!(html.contains("<th scope=\"col\"><button type=\"button\">name"));
        assert!(html.contains("<th scope=\"col\" class=\"number\"><button type=\"button\">loss"));
        assert!(html.contains("<tr><th scope=\"row\">&lt;a&gt;</th><td class=\"number\">1.5 ± 0.1</td></tr>"));
        assert!(html.contains("<tfoot><tr><th scope=\"row\">all</th><td class=\"number\">-2</td></tr>"));
        assert_eq!(class(&[vec!["x".repeat(49)]], 0), " class=\"long\"");
    }
}
