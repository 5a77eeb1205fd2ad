//! A persistent radix tree: a copy shares everything with its original but the path to what changed.

use std::sync::Arc;

const BITS: u32 = 6;
const WIDTH: usize = 1 << BITS;

/// A map from the low `LEVELS * 6` bits of a number to a value. Cloning is one reference count;
/// changing a clone copies `LEVELS` nodes of 64 entries.
#[derive(Clone, Debug)]
pub(crate) struct Radix<T, const LEVELS: u32> {
    root: Option<Arc<Node<T>>>,
}

#[derive(Clone, Debug)]
// Both kinds are about as large in practice: a leaf holds 64 options of a pointer or a boxed slice.
#[allow(clippy::large_enum_variant)]
enum Node<T> {
    Branch([Option<Arc<Self>>; WIDTH]),
    Leaf([Option<T>; WIDTH]),
}

impl<T, const LEVELS: u32> Default for Radix<T, LEVELS> {
    fn default() -> Self {
        Self { root: None }
    }
}

impl<T: Clone, const LEVELS: u32> Radix<T, LEVELS> {
    pub(crate) const BITS: u32 = LEVELS * BITS;

    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let mut node = self.root.as_deref()?;
        let mut level = LEVELS - 1;
        loop {
            match node {
                Node::Branch(children) => node = children[digit(key, level)].as_deref()?,
                Node::Leaf(values) => return values[digit(key, 0)].as_ref(),
            }
            level = level.saturating_sub(1);
        }
    }

    /// The place for `key`, made if it is not there. Nodes that other copies share are copied first.
    pub(crate) fn slot(&mut self, key: u64) -> &mut Option<T> {
        let mut node = self.root.get_or_insert_with(|| Arc::new(Node::empty(LEVELS - 1)));
        let mut level = LEVELS - 1;
        loop {
            match Arc::make_mut(node) {
                Node::Branch(children) => {
                    level -= 1;
                    node =
                        children[digit(key, level + 1)].get_or_insert_with(|| Arc::new(Node::empty(level)));
                }
                Node::Leaf(values) => return &mut values[digit(key, 0)],
            }
        }
    }

    pub(crate) fn for_each<'a>(&'a self, mut visit: impl FnMut(&'a T)) {
        fn walk<'a, T>(node: &'a Node<T>, visit: &mut impl FnMut(&'a T)) {
            match node {
                Node::Branch(children) => children.iter().flatten().for_each(|child| walk(child, visit)),
                Node::Leaf(values) => values.iter().flatten().for_each(visit),
            }
        }
        if let Some(root) = &self.root {
            walk(root, &mut visit);
        }
    }
}

impl<T> Node<T> {
    fn empty(level: u32) -> Self {
        if level == 0 { Self::Leaf([const { None }; WIDTH]) } else { Self::Branch([const { None }; WIDTH]) }
    }
}

const fn digit(key: u64, level: u32) -> usize {
    (key >> (level * BITS)) as usize & (WIDTH - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_copy_leaves_its_original_alone() {
        let mut one: Radix<u64, 3> = Radix::default();
        for key in 0..5_000 {
            *one.slot(key * 37) = Some(key);
        }
        let mut two = one.clone();
        *two.slot(37) = Some(99);
        *two.slot(74) = None;
        assert_eq!((one.get(37), one.get(74)), (Some(&1), Some(&2)));
        assert_eq!((two.get(37), two.get(74)), (Some(&99), None));
        assert_eq!(two.get(111), Some(&3));
        assert_eq!(one.get(1), None);
        let mut sum = 0;
        one.for_each(|_| sum += 1);
        assert_eq!(sum, 5_000);
    }
}
