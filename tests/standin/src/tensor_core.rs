//! Matrix products of a warp, and the shared memory they are fed from.

use crate::access::active;
use crate::decode::{Instruction, Mma};
use crate::number::{Brain, Half};
use crate::ptx::Type;
use crate::registers::{LANES, Registers};
use crate::shared::Seen;
use crate::vm::{Execution, Stop, Warp};

/// D = A B + C with A of 16 rows, B of 8 columns, and `depth` between. Products are exact; a tensor core adds them up with
/// some more bits than f32 has, and here the sum is rounded once.
pub fn mma(r: &mut Registers, ty: Type, depth: u32, registers: &Mma) {
    let depth = depth as usize;
    let value = |bits: u32| match ty {
        Type::Bf16 => f64::from(Brain(bits as u16).wide()),
        _ => f64::from(Half(bits as u16).wide()),
    };
    let (mut a, mut b) = ([[0f64; 16]; 16], [[0f64; 8]; 16]);
    for lane in 0..LANES {
        let (group, place) = (lane / 4, lane % 4);
        for (n, &at) in registers.a.iter().enumerate() {
            let pair = r.get::<u32>(at)[lane];
            let (row, column) = (group + 8 * (n % 2), 2 * place + 8 * (n / 2));
            a[row][column] = value(pair & 0xffff);
            a[row][column + 1] = value(pair >> 16);
        }
        for (n, &at) in registers.b.iter().enumerate() {
            let pair = r.get::<u32>(at)[lane];
            let row = 2 * place + 8 * n;
            b[row][group] = value(pair & 0xffff);
            b[row + 1][group] = value(pair >> 16);
        }
    }
    let place = |lane: usize, n: usize| (lane / 4 + 8 * (n / 2), 2 * (lane % 4) + n % 2);
    let mut sums = [[0f64; 8]; 16];
    for (n, &at) in registers.c.iter().enumerate() {
        for (lane, bits) in r.get::<u32>(at).iter().enumerate() {
            let (row, column) = place(lane, n);
            sums[row][column] = f64::from(f32::from_bits(*bits));
        }
    }
    for (row, sums) in sums.iter_mut().enumerate() {
        for (k, b) in b.iter().enumerate().take(depth) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = a[row][k].mul_add(*b, *sum);
            }
        }
    }
    for (n, &at) in registers.d.iter().enumerate() {
        let result = std::array::from_fn(|lane| {
            let (row, column) = place(lane, n);
            (sums[row][column] as f32).to_bits()
        });
        r.put::<u32>(at, u32::MAX, &result);
    }
}

impl Execution<'_> {
    /// Each lane gets two neighbours of a row of 8, or, transposed, of a column; lane n gives the address of row n.
    pub fn load_matrix(
        &mut self,
        w: &mut Warp,
        i: &Instruction,
        on: u32,
        count: usize,
        transposed: bool,
    ) -> Result<(), Stop> {
        let rows = *w.registers.get::<u64>(i.s[0]);
        let mut seen = Seen::default();
        for matrix in 0..count {
            let mut values = [[0u16; 8]; 8];
            for (row, values) in values.iter_mut().enumerate() {
                let at = rows[8 * matrix + row].wrapping_add(i.offset as u64);
                let mut bytes = [0; 16];
                check_row(at)?;
                seen.join(self.shared.read(at, &mut bytes, w.index)?);
                for (value, pair) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = u16::from_le_bytes([pair[0], pair[1]]);
                }
            }
            let element = |row: usize, column: usize| {
                u32::from(if transposed { values[column][row] } else { values[row][column] })
            };
            let pair = |lane: usize| element(lane / 4, 2 * (lane % 4)) | element(lane / 4, 2 * (lane % 4) + 1) << 16;
            w.registers.put::<u32>(i.d[matrix], on, &std::array::from_fn(pair));
        }
        self.saw(seen, i);
        Ok(())
    }

    /// The other way round.
    pub fn store_matrix(
        &mut self,
        w: &mut Warp,
        i: &Instruction,
        on: u32,
        count: usize,
        transposed: bool,
    ) -> Result<(), Stop> {
        let rows = *w.registers.get::<u64>(i.d[0]);
        let mut seen = Seen::default();
        for matrix in 0..count {
            let pairs = *w.registers.get::<u32>(i.s[matrix]);
            let mut values = [[0u16; 8]; 8];
            for lane in active(on) {
                for (n, half) in [pairs[lane] as u16, (pairs[lane] >> 16) as u16].into_iter().enumerate() {
                    let (row, column) = (lane / 4, 2 * (lane % 4) + n);
                    values[if transposed { column } else { row }][if transposed { row } else { column }] = half;
                }
            }
            for (row, values) in values.iter().enumerate() {
                let at = rows[8 * matrix + row].wrapping_add(i.offset as u64);
                check_row(at)?;
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                seen.join(self.shared.write(at, &bytes, w.index)?);
            }
        }
        self.saw(seen, i);
        Ok(())
    }
}

fn check_row(at: u64) -> Result<(), Stop> {
    if at.is_multiple_of(16) { Ok(()) } else { Err(Stop::Fault(format!("misaligned: a row of 16 bytes at {at:#x}"))) }
}
