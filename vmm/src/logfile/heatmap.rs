//! `vmm log heatmap`: dirty memory over time, as a picture.

mod canvas;
mod png;
mod svg;

use std::io::IsTerminal;
use std::path::Path;

use dirty_track::addr::PAGE_SIZE;
use dirty_track::log::{Event, Header};

use super::{LogfileError, open, print, read_error, write_error};
use crate::beside;
use crate::options::human_size;
use canvas::{Anchor, Canvas, Colour};

/// Rows: parts of guest memory, the lowest first.
const ROWS: usize = 256;

/// Columns that are kept at most. Of more, neighbours are put together.
const COLUMNS: usize = 2048;

/// Dirty memory over time.
struct Heat {
    columns: Vec<Column>,
    /// Epochs in a column.
    together: u32,
    /// First page of each slot, counted over all slots, and its first frame.
    slots: Vec<(u64, u64)>,
    pages: u64,
}

/// Some epochs.
#[derive(Clone)]
struct Column {
    from_s: f64,
    to_s: f64,
    epochs: u32,
    /// Pages of each part of memory, over all epochs.
    dirty: Box<[f32; ROWS]>,
}

impl Heat {
    fn new(header: &Header) -> Heat {
        let (mut slots, mut pages) = (Vec::new(), 0);
        for slot in &header.slots {
            slots.push((pages, slot.first));
            pages += slot.pages;
        }
        Heat { columns: Vec::new(), together: 1, slots, pages }
    }

    fn begin(&mut self, from_s: f64, to_s: f64) {
        if let Some(last) = self.columns.last_mut().filter(|last| last.epochs < self.together) {
            last.to_s = to_s;
            last.epochs += 1;
            return;
        }
        if self.columns.len() == COLUMNS {
            let pairs = self.columns.chunks(2).map(|pair| {
                let mut both = pair[0].clone();
                for next in &pair[1..] {
                    both.to_s = next.to_s;
                    both.epochs += next.epochs;
                    both.dirty.iter_mut().zip(next.dirty.iter()).for_each(|(sum, more)| *sum += more);
                }
                both
            });
            self.columns = pairs.collect();
            self.together *= 2;
        }
        self.columns.push(Column { from_s, to_s, epochs: 1, dirty: Box::new([0.0; ROWS]) });
    }

    /// The page of all slots' that is frame `gfn`.
    fn page(&self, gfn: u64) -> u64 {
        let at = self.slots.partition_point(|(_, first)| *first <= gfn);
        let (page, first) = self.slots[at.saturating_sub(1)];
        page + gfn.saturating_sub(first)
    }

    /// The guest-physical address of page `page` of all slots'.
    fn gpa(&self, page: u64) -> u64 {
        let at = self.slots.partition_point(|(start, _)| *start <= page);
        let (start, first) = self.slots[at.saturating_sub(1)];
        (first + page - start) * PAGE_SIZE
    }

    /// A run of dirty pages of one slot, in the last column.
    fn add(&mut self, gfn: u64, pages: u64) {
        let (start, per_row) = (self.page(gfn), self.per_row());
        let Some(column) = self.columns.last_mut() else { return };
        let end = (start + pages).min(self.pages) as f64;
        let mut at = start as f64;
        while at < end {
            let row = ((at / per_row) as usize).min(ROWS - 1);
            let next = if row + 1 == ROWS { end } else { end.min((row + 1) as f64 * per_row) };
            column.dirty[row] += (next - at) as f32;
            // A row's end that rounds to where we are would be no step.
            at = if next > at { next } else { end };
        }
    }

    fn per_row(&self) -> f64 {
        (self.pages as f64 / ROWS as f64).max(f64::MIN_POSITIVE)
    }

    fn end_s(&self) -> f64 {
        self.columns.last().map_or(0.0, |last| last.to_s)
    }

    /// Share of the part `rows` of memory that was dirty in an epoch between these times, as a mean.
    fn share(&self, from_s: f64, to_s: f64, rows: std::ops::Range<usize>) -> f64 {
        let first = self.columns.partition_point(|column| column.to_s <= from_s);
        let (mut weight, mut sum) = (0.0, 0.0);
        for column in self.columns[first..].iter().take_while(|column| column.from_s < to_s) {
            let overlap = column.to_s.min(to_s) - column.from_s.max(from_s);
            let dirty: f32 = column.dirty[rows.clone()].iter().sum();
            weight += overlap;
            sum += overlap * f64::from(dirty) / f64::from(column.epochs);
        }
        if weight > 0.0 { sum / weight / (rows.len() as f64 * self.per_row()) } else { 0.0 }
    }

    /// Where one slot ends and the next begins with a gap between them, in rows.
    fn gaps(&self) -> impl Iterator<Item = f64> + '_ {
        let pairs = self.slots.windows(2);
        let apart = pairs.filter(|pair| pair[1].1 - pair[0].1 > pair[1].0 - pair[0].0);
        apart.map(|pair| pair[1].0 as f64 / self.per_row())
    }
}

/// Draws the log at `path`: into `output`, a PNG or an SVG, or as text.
///
/// # Errors
/// See [`LogfileError`].
pub fn heatmap(path: &Path, output: Option<&Path>) -> Result<(), LogfileError> {
    // Before much is read.
    let to = match output {
        None => To::Terminal,
        Some(output) => match output.extension().and_then(|kind| kind.to_str()) {
            Some("png") => To::Png(output),
            Some("svg") => To::Svg(output),
            _ => return Err(LogfileError::Picture(output.to_owned())),
        },
    };
    let mut log = open(path)?;
    let mut heat = Heat::new(log.header());
    while let Some(event) = log.read().map_err(|error| read_error(path, error))? {
        match event {
            Event::Epoch(epoch) => {
                let to = epoch.at_ns as f64 / 1e9;
                let from = (to - epoch.took_ns as f64 / 1e9).max(heat.end_s());
                heat.begin(from, to.max(from));
            }
            Event::Ranges(spans) => {
                spans.iter().for_each(|span| heat.add(span.range.start.0, span.range.pages));
            }
            _ => {}
        }
    }
    if heat.end_s() <= 0.0 || heat.pages == 0 {
        return Err(LogfileError::Empty(path.to_owned()));
    }
    let subject = format!("{}, tracked by {}", human_size(heat.pages * PAGE_SIZE), log.header().tracker);
    match to {
        To::Svg(output) => {
            let mut canvas = svg::Svg::new(WIDTH, HEIGHT);
            draw(&heat, &subject, &mut canvas);
            beside::write(output, canvas.finish().as_bytes()).map_err(write_error(output))
        }
        To::Png(output) => {
            let mut canvas = png::Png::new(WIDTH as u32, HEIGHT as u32);
            draw(&heat, &subject, &mut canvas);
            let bytes = canvas.finish().map_err(write_error(output))?;
            beside::write(output, &bytes).map_err(write_error(output))
        }
        To::Terminal => print(|out| Ok(out.write_all(text(&heat, &subject).as_bytes())?)),
    }
}

/// Where the picture goes.
enum To<'a> {
    Png(&'a Path),
    Svg(&'a Path),
    Terminal,
}

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 720.0;
/// The map's place.
const LEFT: f64 = 110.0;
const TOP: f64 = 70.0;
const MAP_WIDTH: f64 = 960.0;
const MAP_HEIGHT: f64 = 512.0;

const INK: Colour = Colour(0x24, 0x29, 0x2f);
const FAINT: Colour = Colour(0x6e, 0x77, 0x81);
const PAPER: Colour = Colour(0xff, 0xff, 0xff);
const CLEAN: Colour = Colour(0xf3, 0xf4, 0xf6);

/// Smallest share that has a colour of its own; what is less, and not nothing, has the same.
const LEAST: f64 = 0.001;

/// From little to all: light to dark, the same for those who do not see red or green.
const SCALE: [Colour; 6] = [
    Colour(0xfd, 0xe8, 0xc8),
    Colour(0xfc, 0xb4, 0x69),
    Colour(0xf0, 0x6f, 0x3c),
    Colour(0xc2, 0x2e, 0x53),
    Colour(0x7a, 0x1a, 0x6c),
    Colour(0x2a, 0x0b, 0x45),
];

/// The colour of a share of dirty pages, on a logarithmic scale.
fn colour(share: f64) -> Colour {
    if share <= 0.0 {
        return CLEAN;
    }
    let at = (1.0 - share.clamp(LEAST, 1.0).log10() / LEAST.log10()) * (SCALE.len() - 1) as f64;
    let low = (at as usize).min(SCALE.len() - 2);
    SCALE[low].towards(SCALE[low + 1], at - low as f64)
}

fn draw(heat: &Heat, subject: &str, canvas: &mut impl Canvas) {
    canvas.rect(0.0, 0.0, WIDTH, HEIGHT, PAPER);
    canvas.text(LEFT, 34.0, Anchor::Start, 20, INK, "Dirty memory over time");
    canvas.text(LEFT + MAP_WIDTH, 34.0, Anchor::End, 14, FAINT, subject);
    canvas.rect(LEFT, TOP, MAP_WIDTH, MAP_HEIGHT, CLEAN);

    let end = heat.end_s();
    let (columns, row_height) = (MAP_WIDTH as usize / 2, MAP_HEIGHT / ROWS as f64);
    let width = MAP_WIDTH / columns as f64;
    for row in 0..ROWS {
        // Runs of one colour are one rectangle.
        let of = |column: usize| {
            let time = |column: usize| end * column as f64 / columns as f64;
            colour(heat.share(time(column), time(column + 1), row..row + 1))
        };
        let mut column = 0;
        while column < columns {
            let here = of(column);
            let next = (column + 1..columns).find(|&next| of(next) != here).unwrap_or(columns);
            if here != CLEAN {
                // The lowest address is at the bottom.
                let y = TOP + MAP_HEIGHT - (row + 1) as f64 * row_height;
                canvas.rect(
                    LEFT + column as f64 * width,
                    y,
                    (next - column) as f64 * width,
                    row_height,
                    here,
                );
            }
            column = next;
        }
    }
    for row in heat.gaps() {
        canvas.line(LEFT, TOP + MAP_HEIGHT - row * row_height, LEFT + MAP_WIDTH, FAINT);
    }

    // Time below, addresses at the left.
    for tick in ticks(end, 8) {
        let x = LEFT + tick / end * MAP_WIDTH;
        canvas.rect(x, TOP + MAP_HEIGHT, 1.0, 5.0, INK);
        canvas.text(x, TOP + MAP_HEIGHT + 22.0, Anchor::Middle, 14, INK, &seconds(tick, end));
    }
    canvas.text(
        LEFT + MAP_WIDTH / 2.0,
        TOP + MAP_HEIGHT + 46.0,
        Anchor::Middle,
        14,
        FAINT,
        "time since the log began, in seconds",
    );
    for eighth in 0..=8u64 {
        let y = TOP + MAP_HEIGHT * (1.0 - eighth as f64 / 8.0);
        canvas.rect(LEFT - 5.0, y.min(TOP + MAP_HEIGHT - 1.0), 5.0, 1.0, INK);
        let gpa = match eighth {
            8 => heat.gpa(heat.pages - 1) + PAGE_SIZE,
            eighth => heat.gpa((heat.pages as f64 * eighth as f64 / 8.0) as u64),
        };
        canvas.text(LEFT - 10.0, y + 5.0, Anchor::End, 14, INK, &human_size(gpa));
    }
    canvas.text(LEFT - 10.0, TOP - 16.0, Anchor::End, 14, FAINT, "guest-physical");

    // What the colours mean.
    let (x, y, width) = (LEFT + MAP_WIDTH + 30.0, TOP, 18.0);
    let steps = 128;
    for step in 0..steps {
        let share = LEAST.powf(1.0 - f64::from(step) / f64::from(steps - 1));
        let height = MAP_HEIGHT / 2.0 / f64::from(steps);
        canvas.rect(
            x,
            y + MAP_HEIGHT / 2.0 - f64::from(step + 1) * height,
            width,
            height + 0.5,
            colour(share),
        );
    }
    for (index, label) in ["0.1 %", "1 %", "10 %", "100 %"].into_iter().enumerate() {
        let at = y + MAP_HEIGHT / 2.0 * (1.0 - index as f64 / 3.0);
        canvas.text(x + width + 8.0, at + 5.0, Anchor::Start, 14, INK, label);
    }
    canvas.rect(x, y + MAP_HEIGHT / 2.0 + 14.0, width, 14.0, CLEAN);
    canvas.text(x + width + 8.0, y + MAP_HEIGHT / 2.0 + 26.0, Anchor::Start, 14, INK, "clean");
    canvas.text(x, TOP - 16.0, Anchor::Start, 14, FAINT, "dirty pages");
    let epochs: u32 = heat.columns.iter().map(|column| column.epochs).sum();
    let each = human_size((heat.per_row() * PAGE_SIZE as f64) as u64);
    let note =
        format!("{epochs} epochs; a row is {each} of memory; share of its pages that an epoch dirtied");
    canvas.text(LEFT, HEIGHT - 28.0, Anchor::Start, 14, FAINT, &note);
}

/// Round times from 0 to `end`, about as many as `wanted`.
fn ticks(end: f64, wanted: u32) -> Vec<f64> {
    let raw = end / f64::from(wanted);
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|step| *step >= raw);
    let step = step.unwrap_or(10.0 * power);
    (0..=(end / step) as u32).map(|tick| f64::from(tick) * step).collect()
}

fn seconds(tick: f64, end: f64) -> String {
    match end {
        ..0.1 => format!("{tick:.3}"),
        ..1.0 => format!("{tick:.2}"),
        ..10.0 => format!("{tick:.1}"),
        _ => format!("{tick:.0}"),
    }
}

/// Columns and rows of the picture as text.
const TEXT: (usize, usize) = (72, 16);

/// For a terminal: half a row a line and a half, by the colours that it has, or by shades.
fn text(heat: &Heat, subject: &str) -> String {
    let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut out = format!("dirty memory over time, {subject}\n");
    let end = heat.end_s();
    for line in (0..TEXT.1).rev() {
        let label = human_size(heat.gpa((heat.pages as f64 * line as f64 / TEXT.1 as f64) as u64));
        out.push_str(&format!("{label:>10} │"));
        for column in 0..TEXT.0 {
            let time = |column: usize| end * column as f64 / TEXT.0 as f64;
            let rows = line * ROWS / TEXT.1..(line + 1) * ROWS / TEXT.1;
            let share = heat.share(time(column), time(column + 1), rows);
            let Colour(red, green, blue) = colour(share);
            match share {
                0.0 => out.push(' '),
                _ if coloured => out.push_str(&format!("\x1b[38;2;{red};{green};{blue}m█\x1b[0m")),
                ..0.01 => out.push('░'),
                ..0.1 => out.push('▒'),
                ..0.5 => out.push('▓'),
                _ => out.push('█'),
            }
        }
        out.push('\n');
    }
    out.push_str(&format!("{:>10} └{}\n", "", "─".repeat(TEXT.0)));
    out.push_str(&format!(
        "{:>11} 0{:>width$}\n",
        "",
        format!("{} s", seconds(end, end)),
        width = TEXT.0 - 1
    ));
    if !coloured {
        out.push_str("            share of pages dirtied by an epoch: ░ below 1 %  ▒ 10 %  ▓ 50 %  █ more\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use dirty_track::log::{SlotInfo, StreamId};
    use dirty_track::tracker::{Backing, Kind};

    use super::*;

    fn header(slots: &[(u64, u64)]) -> Header {
        let slots = slots.iter().enumerate();
        Header {
            id: StreamId(1),
            parent: None,
            page_size: PAGE_SIZE,
            slots: slots.map(|(id, &(first, pages))| SlotInfo { id: id as u32, first, pages }).collect(),
            tracker: "test".into(),
            guarantees: Kind::KvmBitmap.guarantees(Backing::Private),
            contents: false,
            checked: true,
            creator: String::new(),
        }
    }

    #[test]
    fn pages_are_where_they_were_dirtied_and_when() {
        let mut heat = Heat::new(&header(&[(0, 512), (0x10_0000, 512)]));
        heat.begin(0.0, 1.0);
        heat.add(0, 4);
        heat.begin(1.0, 2.0);
        heat.add(0x10_0000, 2);
        assert_eq!(heat.share(0.0, 1.0, 0..1), 1.0);
        assert_eq!(heat.share(0.0, 1.0, 0..2), 0.5);
        assert_eq!(heat.share(0.0, 1.0, 2..ROWS), 0.0);
        assert_eq!(heat.share(0.0, 2.0, 0..1), 0.5);
        assert_eq!(heat.share(1.0, 2.0, 128..129), 0.5);
        assert_eq!(heat.gaps().collect::<Vec<_>>(), [128.0]);
        assert_eq!((heat.gpa(0), heat.gpa(511), heat.gpa(512)), (0, 511 << 12, 0x1_0000_0000));
    }

    #[test]
    fn many_epochs_are_put_together_and_nothing_is_lost() {
        let mut heat = Heat::new(&header(&[(0, 256)]));
        for epoch in 0..10_000 {
            heat.begin(f64::from(epoch), f64::from(epoch + 1));
            heat.add(7, 1);
        }
        assert!(heat.columns.len() <= COLUMNS);
        assert_eq!(heat.columns.iter().map(|column| column.epochs).sum::<u32>(), 10_000);
        assert!((heat.share(0.0, 10_000.0, 7..8) - 1.0).abs() < 1e-6);
        assert_eq!(heat.end_s(), 10_000.0);
    }

    #[test]
    fn colours_go_from_clean_to_all() {
        assert_eq!(colour(0.0), CLEAN);
        assert_eq!(colour(1e-9), SCALE[0]);
        assert_eq!(colour(1.0), SCALE[5]);
        assert_eq!(ticks(10.0, 8), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
    }
}
