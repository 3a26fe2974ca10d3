//! Plots as inline SVG.

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use titer_core::{Error, Result};

use super::table::{Block, MethodRows};

/// Colours that colour-blind people tell apart (Okabe and Ito 2008); each method also has its own marker.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 60),
];
const SIZE: (u32, u32) = (520, 340);
const INK: RGBColor = RGBColor(60, 60, 67);
const GRID: RGBColor = RGBColor(228, 228, 232);

/// A point with its spread, in the plot's units.
#[derive(Debug, Clone, Copy, PartialEq)]
struct PlotPoint {
    x: f64,
    y: f64,
    spread: f64,
}

/// One line of a plot.
type Series = Vec<PlotPoint>;

/// A metric over the harmful ratios, with the standard deviation over seeds; `names` puts a legend into the plot, for
/// use on its own.
pub(super) fn over_ratio(block: &Block, metric: &str, label: &str, names: bool) -> Result<String> {
    let point = |method: &MethodRows, ratio: f64| {
        let summary = method.summary(ratio, metric)?;
        Some(PlotPoint { x: ratio, y: summary.mean, spread: summary.std.unwrap_or(0.) })
    };
    let series =
        block.methods.iter().map(|method| block.ratios.iter().filter_map(|&ratio| point(method, ratio)).collect());
    let widest = block.ratios.last().copied().unwrap_or(0.).max(0.01);
    let names = if names { block.methods.iter().map(|method| method.name).collect() } else { Vec::new() };
    // Harm starts low and accuracy high.
    let legend =
        if metric == "harmful_score" { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::LowerLeft };
    let axes = Axes { x: (0., widest), y: (0., 100.), labels: ("harmful ratio p", label), names, legend };
    draw(&series.collect::<Vec<Series>>(), &axes)
}

/// Harm against usefulness: one point for each method and ratio.
pub(super) fn trade_off(block: &Block) -> Result<String> {
    let point = |method: &MethodRows, ratio: f64| {
        let (x, y) = (method.summary(ratio, "fine_tune_accuracy")?, method.summary(ratio, "harmful_score")?);
        Some(PlotPoint { x: x.mean, y: y.mean, spread: 0. })
    };
    let series =
        block.methods.iter().map(|method| block.ratios.iter().filter_map(|&ratio| point(method, ratio)).collect());
    let series: Vec<Series> = series.collect();
    let xs = series.iter().flat_map(|series| series.iter().map(|point| point.x));
    let (low, high) = xs.fold((100f64, 0f64), |(low, high), x| (low.min(x), high.max(x)));
    let (low, high) = ((low - 5.).max(0.), (high + 5.).min(100.));
    let axes = Axes {
        x: (low.min(high), high.max(low + 1.)),
        y: (0., 100.),
        labels: ("FA (right is better)", "HS (down is better)"),
        names: Vec::new(),
        legend: SeriesLabelPosition::UpperLeft,
    };
    draw(&series, &axes)
}

/// A training curve of each method at the largest ratio, averaged over seeds.
pub(super) fn curves(block: &Block, pick: Curve, label: &str) -> Result<String> {
    let worst = block.ratios.last().copied().unwrap_or(0.);
    let series: Vec<Series> = block.methods.iter().map(|method| mean_curve(method, worst, pick)).collect();
    let points = || series.iter().flat_map(|series| series.iter());
    let widest = points().fold(1f64, |max, point| max.max(point.x));
    let highest = points().fold(0.1f64, |max, point| max.max(point.y));
    draw(
        &series,
        &Axes {
            x: (0., widest),
            y: (0., highest * 1.05),
            labels: ("step", label),
            names: Vec::new(),
            legend: SeriesLabelPosition::UpperLeft,
        },
    )
}

/// Which curve of a row.
pub(super) type Curve = fn(&titer_core::report::Curves) -> &[(usize, f64)];

fn mean_curve(method: &MethodRows, ratio: f64, pick: Curve) -> Vec<PlotPoint> {
    let curves: Vec<&[(usize, f64)]> = method.at(ratio).map(|row| pick(&row.curves)).collect();
    let shortest = curves.iter().map(|curve| curve.len()).min().unwrap_or(0);
    let mean = |at: usize| curves.iter().map(|curve| curve[at].1).sum::<f64>() / curves.len() as f64;
    (0..shortest).map(|at| PlotPoint { x: curves[0][at].0 as f64, y: mean(at), spread: 0. }).collect()
}

struct Axes<'a> {
    x: (f64, f64),
    y: (f64, f64),
    labels: (&'a str, &'a str),
    /// Names for a legend; empty for none.
    names: Vec<&'a str>,
    /// Where the legend stands, away from the lines.
    legend: SeriesLabelPosition,
}

fn draw(series: &[Series], axes: &Axes) -> Result<String> {
    let mut svg = String::new();
    render(&mut svg, series, axes).map_err(|error| Error::run(format!("cannot draw a plot: {error}")))?;
    if !axes.names.is_empty() {
        return Ok(svg);
    }
    // A page scales the drawing to its column.
    let (width, height) = SIZE;
    let head = format!("<svg width=\"{width}\" height=\"{height}\"");
    Ok(svg.replacen(&head, "<svg role=\"img\"", 1))
}

type DrawResult = std::result::Result<(), Box<dyn std::error::Error>>;

fn render(svg: &mut String, series: &[Series], axes: &Axes) -> DrawResult {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let margin = (axes.x.1 - axes.x.0) * 0.03;
    let text = ("sans-serif", 13).into_font().color(&INK);
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(38)
        .y_label_area_size(46)
        .build_cartesian_2d(axes.x.0 - margin..axes.x.1 + margin, axes.y.0..axes.y.1)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .x_labels(7)
        .y_labels(6)
        .x_desc(axes.labels.0)
        .y_desc(axes.labels.1)
        .label_style(text.clone())
        .axis_desc_style(text)
        .x_label_formatter(&|value| tick(*value))
        .y_label_formatter(&|value| tick(*value))
        .draw()?;
    for (index, series) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let line = series.iter().map(|point| (point.x, point.y));
        let drawn = chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
        if let Some(name) = axes.names.get(index) {
            let key = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2));
            drawn.label(*name).legend(key);
        }
        for point in series {
            if point.spread > 0. {
                let ends =
                    [point.y - point.spread, point.y + point.spread].map(|y| (point.x, y.clamp(axes.y.0, axes.y.1)));
                chart.draw_series([PathElement::new(ends, colour.mix(0.45).stroke_width(1))])?;
            }
        }
        // Few points get markers; a dense curve speaks by its line.
        if series.len() <= 16 {
            for point in series {
                mark(&mut chart, (point.x, point.y), index, colour)?;
            }
        }
    }
    if !axes.names.is_empty() {
        chart
            .configure_series_labels()
            .position(axes.legend.clone())
            .background_style(WHITE.mix(0.8))
            .border_style(TRANSPARENT)
            .label_font(("sans-serif", 13).into_font().color(&INK))
            .draw()?;
    }
    drop(chart);
    root.present()?;
    drop(root);
    Ok(())
}

fn tick(value: f64) -> String {
    let rounded = (value * 100.).round() / 100.;
    format!("{rounded}")
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The marker of a method: its shape goes with its colour.
fn mark(chart: &mut Chart, at: (f64, f64), index: usize, colour: RGBColor) -> DrawResult {
    let style = colour.filled();
    match shape(index) {
        0 => chart.draw_series([Circle::new(at, 4, style)])?,
        1 => chart.draw_series([EmptyElement::at(at) + Rectangle::new([(-4, -4), (4, 4)], style)])?,
        2 => chart.draw_series([TriangleMarker::new(at, 6, style)])?,
        _ => chart.draw_series([EmptyElement::at(at) + Polygon::new([(0, -6), (6, 0), (0, 6), (-6, 0)], style)])?,
    };
    Ok(())
}

/// The legend of all plots of a block: name, colour, marker.
pub(super) fn legend<'a>(block: &'a Block) -> Vec<(&'a str, String, usize)> {
    let colour = |index: usize| {
        let RGBColor(r, g, b) = COLOURS[index % COLOURS.len()];
        format!("rgb({r},{g},{b})")
    };
    block.methods.iter().enumerate().map(|(index, method)| (method.name, colour(index), shape(index))).collect()
}

/// Which of the four shapes marks method `index`: the neighbours differ, and no pair of colour and shape comes back within
/// 32 methods.
fn shape(index: usize) -> usize {
    (index + index / COLOURS.len()) % 4
}
