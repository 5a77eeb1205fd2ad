//! Tables: for eyes on a terminal, for `cut` and `awk` elsewhere.
//!
//! On a terminal: aligned columns that fit its width. Elsewhere: tab-separated values with a header line,
//! never wrapped, never cut. Scripts that must not break use `--json`.

use comfy_table::{CellAlignment, ContentArrangement, Table as Comfy, presets};

use super::output::Output;

/// Rows under a header.
pub(crate) struct Table {
    header: Vec<&'static str>,
    numeric: Vec<usize>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), numeric: Vec::new(), rows: Vec::new() }
    }

    /// Columns of numbers, which are aligned to the right.
    pub(crate) fn numeric(mut self, columns: &[usize]) -> Self {
        self.numeric = columns.to_vec();
        self
    }

    /// One more row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.header.len(), "a row has a cell for each column");
        self.rows.push(cells);
    }

    /// As text, in the form that `out` can show.
    pub(crate) fn render(&self, out: &Output) -> String {
        if out.pretty() { self.render_aligned(terminal_width()) } else { self.render_tabs() }
    }

    /// Aligned, within `width` columns if that is known.
    pub(crate) fn render_aligned(&self, width: Option<u16>) -> String {
        let mut table = Comfy::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Dynamic);
        if let Some(width) = width {
            table.set_width(width);
        }
        table.set_header(self.header.iter().map(|name| name.to_uppercase()));
        for row in &self.rows {
            table.add_row(row.iter().map(|cell| clean(cell)));
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if self.numeric.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
    }

    fn render_tabs(&self) -> String {
        let mut lines = vec![self.header.join("\t")];
        lines.extend(
            self.rows.iter().map(|row| row.iter().map(|cell| clean(cell)).collect::<Vec<_>>().join("\t")),
        );
        lines.join("\n")
    }
}

/// A value from the server must not move the cursor, ring the bell or break the columns.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Columns of the terminal.
pub(crate) fn terminal_width() -> Option<u16> {
    let (_, columns) = console::Term::stdout().size_checked()?;
    Some(columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["service", "copies"]).numeric(&[1]);
        table.row(vec!["shop".into(), "2".into()]);
        table.row(vec!["a-longer-name".into(), "12".into()]);
        table
    }

    #[test]
    fn columns_line_up_and_numbers_stand_on_the_right() {
        let text = table().render_aligned(Some(80));
        assert_eq!(text, "SERVICE        COPIES\nshop                2\na-longer-name      12");
    }

    #[test]
    fn without_a_terminal_rows_are_tab_separated_and_whole() {
        let mut wide = table();
        wide.row(vec!["x".repeat(500), "1".into()]);
        let text = wide.render_tabs();
        assert!(text.starts_with("service\tcopies\nshop\t2\n"), "{text}");
        assert!(text.ends_with(&format!("{}\t1", "x".repeat(500))));
    }

    #[test]
    fn control_characters_from_the_server_do_not_reach_the_terminal() {
        let mut table = Table::new(&["name"]);
        table.row(vec!["evil\u{1b}[2J\tname\n".into()]);
        for text in [table.render_aligned(Some(80)), table.render_tabs()] {
            assert!(!text.contains('\u{1b}') && !text.contains("\tname"), "{text:?}");
        }
    }
}
